"""The table at the end of a run, from a real one."""

import json
import re
from pathlib import Path

import pytest
from runs import make_runner

from mmema.cli import summary


@pytest.mark.parametrize('watched', ['score', 'raw/score'])
def test_both_weights_under_their_own_names(tmp_path, capsys, watched):
    runner = make_runner(
        tmp_path, val_cfg=dict(type='mmema.EMAValLoop'), checkpoint=dict(save_best=watched)
    )
    runner.train()
    capsys.readouterr()
    summary.report(runner, 61)
    lines = capsys.readouterr().out.strip().splitlines()
    table = dict(re.split(' {2,}', line, maxsplit=1) for line in lines)
    scalars = Path(runner.log_dir) / 'vis_data' / 'scalars.json'
    points = [json.loads(line) for line in scalars.read_text().splitlines()]
    for label, name in (('EMA', 'score'), ('raw', 'raw/score')):
        values = [point[name] for point in points if name in point]
        best = max(values)
        assert table[f'score of the {label} weights'].startswith(
            f'best {best:.3f} (epoch {values.index(best) + 1}), last {values[-1]:.3f} (epoch 6)'
        )
    assert table['trained'] == '1 min 1 s'
    assert (tmp_path / 'curve.png').stat().st_size > 5000


def test_a_resumed_run_is_reported_whole(tmp_path, capsys):
    script = dict(enumerate([0.1, 0.9, 0.2, 0.3], 1))
    make_runner(tmp_path, epochs=2, script=script).train()
    runner = make_runner(tmp_path, epochs=4, script=script, resume=True)
    runner.train()
    capsys.readouterr()
    summary.report(runner, 1)
    text = 'score of the EMA weights  best 0.900 (epoch 2), last 0.300 (epoch 4)'
    assert text in capsys.readouterr().out
