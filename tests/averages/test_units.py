"""Momentum in epochs, updates and shares of a run, and for the batch size of the run."""

import pytest
from runs import EMA, assert_same, log_of, make_runner, state_of
from torch import nn

from mmema import (
    RestartableConstantEMA,
    RestartableExpMomentumEMA,
    RestartableUniformAverage,
)
from mmema.averages import units
from mmema.messages import RunError
from mmema.run import ema_hook_of

OURS = dict(EMA, type='mmema.EMAHook')


@pytest.mark.parametrize(
    'horizon, settings, momentum',
    [
        ('2 epochs', dict(), 1 / 8),  # of 4 iterations
        ('1.5 epochs', dict(), 1 / 6),
        ('20 updates', dict(), 1 / 20),
        ('20updates', dict(), 1 / 20),  # as --cfg-options gives it
        ('1.5epochs', dict(), 1 / 6),
        (0.25, dict(), 1 / 6),  # of 24 iterations
        ('2 epochs', dict(accumulative_counts=2), 1 / 4),
        (0.25, dict(accumulative_counts=2), 1 / 3),
        ('20 updates', dict(accumulative_counts=2), 1 / 20),
        ('2 epochs', dict(interval=2), 2 / 8),
    ],
)
def test_a_horizon_becomes_a_momentum(tmp_path, horizon, settings, momentum):
    settings = dict(settings)
    interval = settings.pop('interval', 1)
    ours = {key: value for key, value in OURS.items() if key != 'momentum'}
    also = dict(other=dict(horizon='10 updates'), fixed=dict(momentum=0.3), same={})
    also['mean'] = dict(ema_type='mmema.RestartableUniformAverage')
    runner = make_runner(
        tmp_path,
        ema=dict(ours, horizon=horizon, interval=interval, also=also),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05), **settings),
    )
    runner.train()
    hook = ema_hook_of(runner)
    assert hook.ema_model.momentum == pytest.approx(momentum, rel=1e-12)
    assert hook.also['same'].momentum == pytest.approx(momentum, rel=1e-12)
    assert hook.also['other'].momentum == pytest.approx(interval / 10, rel=1e-12)
    assert hook.also['fixed'].momentum == 0.3
    assert not hook.ema_model.state_dict()['changed.momentum']
    assert f'horizon={horizon!r}: momentum 0.0002 -> {momentum:g}' in log_of(runner)


def test_a_run_with_a_horizon_is_the_one_with_its_momentum(tmp_path):
    ours = {key: value for key, value in OURS.items() if key != 'momentum'}
    one = make_runner(tmp_path / 'one', ema=dict(ours, horizon='2 epochs'))
    two = make_runner(tmp_path / 'two', ema=dict(ours, momentum=1 / 8))
    for runner in (one, two):
        runner.train()
    assert_same(state_of(one), state_of(two))
    file = tmp_path / 'one/epoch_3.pth'
    settings = dict(ema=dict(ours, horizon='2 epochs'), resume=True, load_from=str(file))
    rest = make_runner(tmp_path / 'rest', **settings)
    rest.train()
    assert_same(state_of(one), state_of(rest))
    assert 'from the config is used' not in log_of(rest)


@pytest.mark.parametrize(
    'horizon, settings, message',
    [
        ('2 epochs', dict(iters=8), 'must be in a run by epochs'),
        ('1 update', dict(), r"longer than interval=1, but horizon='1 update' is 1 updates"),
        (0.01, dict(), 'longer than interval=1, but horizon=0.01 is 0.24 updates of this run'),
    ],
)
def test_a_horizon_that_the_run_does_not_have(tmp_path, horizon, settings, message):
    ours = {key: value for key, value in OURS.items() if key != 'momentum'}
    with pytest.raises(RunError, match=message):
        make_runner(tmp_path, ema=dict(ours, horizon=horizon), **settings).train()


@pytest.mark.parametrize(
    'base, settings, k',
    [
        (12, dict(), 0.5),  # batches of 6
        (3, dict(), 2),
        (6, dict(), 1),
        (6, dict(accumulative_counts=2), 2),
        (None, dict(auto_scale_lr=dict(enable=True, base_batch_size=3)), 2),
        (12, dict(auto_scale_lr=dict(enable=True, base_batch_size=3)), 0.5),
        (None, dict(auto_scale_lr=dict(enable=False, base_batch_size=3)), None),
    ],
)
def test_the_batch_size_scales_momentum_and_gamma(tmp_path, base, settings, k):
    settings = dict(settings)
    counts = settings.pop('accumulative_counts', 1)
    also = dict(
        short=dict(momentum=0.3, restart=dict(milestones=[5], gamma=9)),
        horizon=dict(horizon='20 updates'),
        mean=dict(ema_type='mmema.RestartableUniformAverage'),
    )
    runner = make_runner(
        tmp_path,
        ema=dict(OURS, base_batch_size=base, also=also),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01), accumulative_counts=counts),
        **settings,
    )
    runner.train()
    hook, log = ema_hook_of(runner), log_of(runner)
    times = 1 if k is None else k
    assert hook.ema_model.momentum == pytest.approx(1 - 0.9**times, rel=1e-12)
    assert hook.ema_model.gamma == pytest.approx(5 / times)
    assert hook.also['short'].momentum == pytest.approx(1 - 0.7**times, rel=1e-12)
    assert hook.also['short'].gamma == 9  # the value of a restart is not scaled
    assert hook.also['horizon'].momentum == 1 / 20
    if k is None:
        assert 'EMAHook, the average' not in log
        return
    expected = (
        f'EMAHook, the average: a batch of {6 * counts} with base_batch_size={base or 3}: momentum '
        f'0.1 -> {1 - 0.9**k:g}, gamma 5 -> {5 / k:g}'
    )
    assert expected in log


def test_yolox(tmp_path):
    """YOLOX-s is trained with 64 and with 128 pictures in a batch."""
    scaled = units.scaled(dict(momentum=1e-4, gamma=2000), 128 / 64)
    assert scaled == {'momentum': pytest.approx(1.9999e-4, rel=1e-9), 'gamma': 1000}


@pytest.mark.parametrize('momentum', [1e-2, 2e-4, 1e-5])
@pytest.mark.parametrize('kind', [RestartableConstantEMA, RestartableExpMomentumEMA])
def test_the_least_change_is_the_one_that_float32_follows(momentum, kind):
    # At a power of two the last place is worth most: half a unit is 2**-24 of the value.
    model = nn.Linear(1, 1, bias=False)
    ema = kind(model, momentum)
    least = units.least_change(ema, 10**9)
    assert least == pytest.approx(2**-24 / momentum, rel=1e-6)
    for factor, moves in ((0.95, False), (1.05, True)):
        nn.init.constant_(ema.module.weight, 1)
        ema.steps.fill_(10**8)
        model.weight.data.fill_(1).mul_(1 + factor * least)
        ema.update_parameters(model)
        assert (ema.module.weight.item() > 1) == moves


def test_the_least_change_of_other_schedules():
    model = nn.Linear(1, 1)
    mean = RestartableUniformAverage(model)
    assert units.least_change(mean, 1000) == pytest.approx(1000 * 2**-24)  # m = 1 / 1000
    spaced = RestartableConstantEMA(model, 0.01, interval=50)
    assert units.least_change(spaced, 1000) == pytest.approx(100 * 2**-24)
    assert units.least_change(nn.Module(), 1000) is None


@pytest.mark.parametrize(
    'momentum, line',
    [
        (2e-4, 'INFO - the average: at momentum 0.0002 changes of a weight below 0.03 % may be'),
        (1e-6, 'below 6 % may be lost; 10 times the interval and the momentum has the same'),
    ],
)
def test_a_run_tells_what_float32_loses(tmp_path, momentum, line):
    settings = dict(OURS, momentum=momentum, ema_type='mmema.RestartableConstantEMA')
    del settings['gamma']
    runner = make_runner(tmp_path, ema=settings, epochs=1)
    runner.train()
    assert log_of(runner).count(line) == 1


def test_a_momentum_that_float32_cannot_move_is_refused(tmp_path):
    settings = dict(OURS, momentum=5e-8, ema_type='mmema.RestartableConstantEMA')
    del settings['gamma']
    with pytest.raises(RunError, match=r'the average: momentum must be above 2\*\*-24'):
        make_runner(tmp_path / 'a', ema=settings, epochs=1).train()
    ours = {key: value for key, value in OURS.items() if key != 'momentum'}
    for horizon in ('100000000000000000000 epochs', '16777216 updates'):
        with pytest.raises(RunError, match='must be shorter than 16,777,216 updates'):
            make_runner(tmp_path / 'b', ema=dict(ours, horizon=horizon), epochs=1).train()
