"""That benchmarks/update_cost.py measures what it says; how long anything takes is not tested."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import update_cost
from torch import nn

from mmema.update.follower import Follower

FOLDER = Path(__file__).resolve().parent.parent / 'benchmarks'


def run(*arguments):
    command = [sys.executable, '-W', 'ignore', FOLDER / 'update_cost.py', *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_table_holds_every_library_that_can_be_imported(tmp_path):
    pytest.importorskip('mmyolo')
    done = run('--quick', '--rounds', '3', '--threads', '1', '--out', tmp_path)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / 'performance.md').read_text()
    assert table.strip() in done.stdout
    for name in ('mmema', 'mmyolo', 'mmdet', 'mmengine', 'torch AveragedModel'):
        assert f'\n| {name} | ' in table
    assert f'\n| {update_cost.LIMIT} | ' in table
    assert table.count('(1.00)') >= 2  # the limit, warm and cold


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        (['--rounds', '2'], '--rounds must be at least 3, got 2'),
        (['--models', 'YOLOv9'], "invalid choice: 'YOLOv9'"),
        pytest.param(
            ['--device', 'cuda'],
            '--device cuda needs a CUDA device, and torch sees none',
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is one'),
        ),
    ],
)
def test_it_refuses(arguments, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['update_cost.py', *arguments])
    with pytest.raises(SystemExit) as stop:
        update_cost.main()
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


def test_a_contender_that_is_off_is_not_measured():
    def wrong(model):
        module, update = update_cost.CONTENDERS['mmema'](model)
        return module, lambda model: (update(model), update(model))

    with pytest.raises(AssertionError, match='a wrong one is off'):
        update_cost.checked(nn.Linear(3, 3), {'a wrong one': wrong})


def test_every_contender_is_right_about_itself():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    makes = {
        name: update_cost.CONTENDERS[name] for name in ('mmema', 'mmengine', 'torch AveragedModel')
    }
    assert set(update_cost.checked(model, makes)) == set(makes)


def test_a_ratio_is_the_median_of_the_ratios_within_a_round():
    seconds = {'a': [1.0, 4.0, 9.0], 'b': [1.0, 2.0, 3.0]}
    assert update_cost.ratio(seconds, 'a', 'b') == 2.0


def test_on_the_host_nothing_is_a_multiple_of_one_launch():
    seconds = {update_cost.LIMIT: [0.001] * 3, 'a': [0.002, 0.003, 0.004]}
    assert update_cost.cell_of(seconds, 'a', 'device') == '3.00 ± 0.50 (3.00)'
    assert update_cost.cell_of(seconds, 'a', 'host') == '3.00 ± 0.50'
    assert update_cost.cell_of(seconds, update_cost.LIMIT, 'host') == '-'
    assert update_cost.cell_of(seconds, 'b', 'host') == '-'


def test_the_table_of_several_averages():
    found = {1: [0.001, 0.002, 0.003], 2: [0.004, 0.004, 0.003]}
    assert update_cost.several_table('X', found).splitlines()[2:] == [
        '| 1 | 2.00 ± 0.50 | 1.00 |',
        '| 2 | 4.00 ± 0.25 | 2.00 |',
    ]


def test_the_ladder_is_blended_as_in_a_run(monkeypatch):
    model = torch.nn.Linear(3, 3)
    update, many = update_cost.update_of_ladder(model, 100_000)
    assert many == 300  # 1/100 of the longest horizon, 30 % of the run
    blends = []
    monkeypatch.setattr(
        Follower, 'update', lambda self, momentum: blends.append(momentum is not None)
    )
    update_cost.repeat(update, 2 * 3000)
    assert all(blends) and len(blends) / 6000 == pytest.approx(0.48, abs=0.005)


def test_the_table_of_the_ladder():
    found = {1000: {'mmyolo': [0.002, 0.002], 'ladder': [0.001, 0.003]}}
    assert update_cost.ladder_table('X', found).splitlines() == [
        '| updates of a run of X | ms, mmyolo | ms, ladder | x mmyolo |',
        '| --- | --- | --- | --- |',
        '| 1,000 | 2.00 ± 0.00 | 2.00 ± 0.50 | 1.00 |',
    ]
