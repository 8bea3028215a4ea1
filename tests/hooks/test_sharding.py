"""Wrapped and sharded models: FlexibleRunner and DDP as the plain Runner, FSDP1 and ZeRO refused.

MMEngine 0.10.7 is wrong in silence with most of these, with its own EMAHook and with an average
of ours in it. The two processes are started once for all tests; see ``sharded_line.py``.
"""

from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import runs
import torch
from marks import SINCE_MMENGINE_0_10_3, since_torch_2_1
from mmengine._strategy import DDPStrategy, DeepSpeedStrategy
from mmengine.runner import FlexibleRunner, Runner
from runs import EMA, Crash, assert_same, ema_of, loader, make_runner, state_of
from torch import nn

from mmema import EMAHook
from mmema.messages import RunError
from mmema.run import ema_hook_of, refuse_unsaved
from mmema.update.refusals import refuse_pieces

TESTS = Path(__file__).parents[1]
OURS = dict(EMA, type='mmema.EMAHook')


@pytest.fixture(scope='module')
def two_ranks(tmp_path_factory):
    """Return the folder in which two ranks have run every case of sharded_line.py."""
    folder = tmp_path_factory.mktemp('two_ranks')
    ranks = forks.start_ranks(2, TESTS / 'sharded_line.py', folder, folder=folder)
    status = [rank.wait() for rank in ranks]
    assert status == [0, 0], (folder / 'rank_0.txt').read_text()[-3000:]
    return folder


@pytest.fixture
def make_flexible(monkeypatch):
    """Return make_runner for a FlexibleRunner, with SingleDeviceStrategy unless told otherwise."""

    def make(*args, **settings):
        monkeypatch.setattr(runs, 'Runner', FlexibleRunner)
        runner = make_runner(*args, **settings)
        monkeypatch.setattr(runs, 'Runner', Runner)
        return runner

    return make


def counted(file):
    """Return (epoch, iteration) of a checkpoint."""
    meta = torch.load(file, weights_only=False)['meta']
    return meta['epoch'], meta['iter']


# --- DDPStrategy ----------------------------------------------------------------------------------


@pytest.mark.parametrize('case', ['ddp_strategy', 'ddp_strategy_resumed'])
def test_ddp_strategy_ends_with_the_bits_of_the_plain_runner(two_ranks, case):
    # mmengine 0.10.7: the first checkpoint is a KeyError; resuming is an AttributeError.
    expected = torch.load(two_ranks / 'ddp_runner.pth')
    assert expected['ema.steps'] == 8  # 4 epochs of 24 samples, 6 for each of two ranks
    assert expected['ema.momentum'].item() == pytest.approx(1 - 0.9**2)
    assert expected['recent.momentum'] == 1 / 4 and expected['recent.gamma'] == 5 / 2
    assert expected['short.restarts'] == 1 and expected['short.gamma'] == 3
    assert expected['plateau.restarts'] > 0
    assert_same(expected, torch.load(two_ranks / f'{case}.pth'))


def test_ddp_strategy_saves_what_the_plain_runner_saves(two_ranks):
    files = sorted(two_ranks.glob('ddp_strategy/*.pth'))
    assert len(files) == 5  # one for each epoch, and the best one
    for file in files:
        ours = torch.load(file, weights_only=False)
        plain = torch.load(two_ranks / 'ddp_runner' / file.name, weights_only=False)
        assert_same(plain['state_dict'], ours['state_dict'])
        assert_same(plain['ema_state_dict'], ours['ema_state_dict'])
        assert counted(file) == counted(two_ranks / 'ddp_runner' / file.name)


# --- FlexibleRunner on one device -----------------------------------------------------------------


@SINCE_MMENGINE_0_10_3
@pytest.mark.parametrize('unit', [dict(epochs=4), dict(iters=16, val_interval=4)])
def test_flexible_runner_trains_and_resumes_as_the_plain_runner(tmp_path, make_flexible, unit):
    # mmengine 0.10.7: to resume is an AttributeError, as it loads before it makes the average.
    also = dict(short=dict(horizon=0.2, restart=dict(milestones=[10], by_epoch=False)))
    unit = dict(unit, ema=dict(OURS, base_batch_size=3, also=also))
    plain = make_runner(tmp_path / 'plain', **unit)
    plain.train()
    whole = make_flexible(tmp_path / 'whole', **unit)
    whole.train()
    assert ema_of(whole).steps == 16
    short = ema_hook_of(whole).also['short']
    assert (ema_of(whole).gamma, short.momentum, int(short.steps)) == (2.5, 1 / 3.2, 6)
    assert_same(state_of(plain), state_of(whole))
    crashed = make_flexible(tmp_path / 'part', Crash(9), **unit)
    with pytest.raises(KeyboardInterrupt):
        crashed.train()
    rest = make_flexible(tmp_path / 'part', resume=True, **unit)
    rest.train()
    assert_same(state_of(plain), state_of(rest))
    assert_same(short.state_dict(), ema_hook_of(rest).also['short'].state_dict())


@pytest.mark.parametrize(
    'unit, last, expected',
    [
        (dict(epochs=3), 'epoch_3.pth', (3, 12)),
        (dict(iters=12, val_interval=4), 'iter_12.pth', (0, 12)),
    ],
)
def test_flexible_runner_counts_in_checkpoints_as_the_plain_runner(
    tmp_path, make_flexible, unit, last, expected
):
    # mmengine 0.10.7: saved again after a new best score, `epoch` (or `iter`) is one too high, and
    # a resumed run leaves one out; `iter` of the best checkpoint is, too.
    counts = []
    for make in (make_runner, make_flexible):
        folder = tmp_path / make.__name__
        make(folder, ema=OURS, **unit).train()
        counts.append({file.name: counted(file) for file in folder.glob('*.pth')})
    assert counts[0] == counts[1] and counts[1][last] == expected


def test_flexible_runner_with_the_stock_hook_counts_one_epoch_too_many(tmp_path, make_flexible):
    # Why mmema.EMAHook mends the checkpoint; MMEngine's own hook does not.
    make_flexible(tmp_path, ema=EMA, epochs=1).train()
    assert counted(tmp_path / 'epoch_1.pth') == (2, 4)


def test_flexible_runner_tests_the_averaged_weights(tmp_path, make_flexible):
    test = dict(
        test_dataloader=loader(shuffle=False), test_cfg=dict(), test_evaluator=dict(type='Score')
    )
    make_flexible(tmp_path, ema=OURS, epochs=2).train()
    results = [
        make(tmp_path, ema=OURS, load_from=str(tmp_path / 'epoch_2.pth'), **test).test()
        for make in (make_runner, make_flexible)
    ]
    assert results[0] == results[1] and results[0]['score'] < 0


# --- refusals -------------------------------------------------------------------------------------


@since_torch_2_1('asks for CUDA in a forked process')
@pytest.mark.parametrize(
    'case, name',
    [
        ('fsdp1_runner', 'FSDP1'),
        ('fsdp1_strategy', 'FSDP1'),
        ('fsdp1_stock_hook', 'FSDP1'),
    ],
)
def test_a_sharded_model_is_refused_by_name(two_ranks, case, name):
    # With FSDP1 training goes on from averaged weights after each validation, and nothing shows it.
    text = (two_ranks / f'{case}.txt').read_text()
    assert f'must not be sharded, but this one is, by {name}. Wrap it in MMDistributed' in text
    assert '\n' not in text
    assert not list((two_ranks / case).glob('*.pth'))


def test_parameters_of_zero_3_are_refused():
    model = nn.Linear(2, 1)
    refuse_pieces(model)
    model.weight.ds_id, model.weight.data = 0, torch.empty(0)
    with pytest.raises(RunError, match=r'this one is, by DeepSpeed ZeRO-3\. Wrap it in'):
        refuse_pieces(model)


@pytest.mark.parametrize('strategy', [DeepSpeedStrategy, type('Own', (DeepSpeedStrategy,), {})])
def test_a_strategy_that_cannot_save_the_average_is_refused(strategy):
    # Its checkpoints would hold the trained weights alone. Not built: it needs deepspeed.
    runner = SimpleNamespace(
        strategy=strategy.__new__(strategy), max_iters=8, max_epochs=2, logger=None
    )
    with pytest.raises(RunError, match="MMEngine's DeepSpeedStrategy cannot hold it"):
        EMAHook().before_train(runner)
    runner.strategy = DDPStrategy.__new__(DDPStrategy)
    refuse_unsaved(runner)
    refuse_unsaved(SimpleNamespace())  # the plain Runner has none
