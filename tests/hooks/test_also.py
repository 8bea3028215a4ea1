"""Several averages in one run: each is the one that a run of its own would have made."""

import contextlib
import random
import re

import pytest
import torch
from mmengine.hooks import Hook
from runs import EMA, Crash, LineModel, assert_same, loader, log_of, make_runner, state_of
from torch import nn

import mmema
from mmema.messages import RunError
from mmema.run import ema_hook_of

OURS = dict(EMA, type='mmema.EMAHook')
SCORES = [0.1, 0.5, 0.4, 0.3, 0.6, 0.2, 0.2, 0.2]
ALL = dict(type='mmema.EMAValLoop')
ALSO = dict(
    short=dict(momentum=0.3),
    buffers=dict(update_buffers=True, interval=3, exclude=['layers.0.*']),
    hard=dict(gamma=3, restart=dict(milestones=[3], gamma=9)),
    soft=dict(restart=dict(every=7, by_epoch=False, steps=4, momentum=0.2)),
    schedule=dict(
        restart=dict(milestones=[5, 13], by_epoch=False, steps=None, momentum=[0.3, 0.4])
    ),
    plateau=dict(restart=dict(on_plateau=dict(metric='score', rule='less', momentum_add=0.05))),
    uniform=dict(ema_type='mmema.RestartableUniformAverage', restart=dict(milestones=[2, 5])),
    threshold=dict(ema_type='mmema.RestartableThresholdEMA', factor=4),
    power=dict(ema_type='mmema.RestartablePowerFunctionEMA', sigma_rel=0.1),
    annealing=dict(ema_type='mmema.RestartableAnnealingEMA', restart=dict(milestones=[4])),
    constant=dict(ema_type='mmema.RestartableConstantEMA', restart=dict(milestones=[1, 4])),
)


def also_of(runner):
    return ema_hook_of(runner).also


def whole_state(runner):
    state = state_of(runner)
    for name, ema in also_of(runner).items():
        state.update({f'{name}.{key}': t.clone() for key, t in ema.state_dict().items()})
    return state


def alone(name, base=OURS, also=ALSO):
    """Return the hooks of a run whose main average has the config of one in ``also``."""
    given = dict(also[name])
    restart = given.pop('restart', None)
    ours = {**base, **given}
    if 'ema_type' in given:
        has = mmema.hooks.average_config.argument_names(
            mmema.hooks.average_config.class_of(given['ema_type'])
        )
        own = ('type', 'ema_type', 'begin_iter', 'per_optimizer_step')
        ours = {key: value for key, value in ours.items() if key in (*has, *own)}
    return ours, [] if restart is None else [dict(type='mmema.EMARestartHook', **restart)]


@pytest.mark.parametrize(
    'settings',
    [
        dict(),
        dict(ema=dict(OURS, update_buffers=True, begin_iter=6)),
        dict(optim_wrapper=dict(accumulative_counts=3, optimizer=dict(type='SGD', lr=0.05))),
        dict(ema=dict(OURS, interval=2, begin_epoch=2), iters=24, val_interval=4),
    ],
    ids=['plain', 'buffers', 'accumulation', 'by_iteration'],
)
def test_each_equals_a_run_of_its_own(tmp_path, settings):
    settings = {'script': None, **settings}
    base = settings.pop('ema', OURS)
    also = ALSO
    if 'iters' in settings:
        base = dict({k: v for k, v in base.items() if k != 'begin_epoch'}, begin_iter=5)
        also = {}
        for name, given in ALSO.items():
            restart = dict(given.get('restart', {}))
            if restart.get('by_epoch', True) and 'milestones' in restart:
                milestones = [4 * at for at in restart['milestones']]
                given = dict(given, restart=dict(restart, milestones=milestones, by_epoch=False))
            also[name] = given
    together = make_runner(tmp_path / 'all', ema=dict(base, also=also), val_cfg=ALL, **settings)
    together.train()
    for name in also:
        ours, hooks = alone(name, base, also)
        own = make_runner(tmp_path / name, *hooks, ema=ours, **settings)
        own.train()
        expected = ema_hook_of(own).ema_model.state_dict()
        assert_same(expected, also_of(together)[name].state_dict())
    plain = make_runner(tmp_path / 'plain', ema=base, **settings)
    plain.train()
    assert_same(state_of(plain), state_of(together))
    if 'hard' in also and 'optim_wrapper' not in settings:
        assert also_of(together)['hard'].restarts == 1
        assert also_of(together)['plateau'].restarts >= 1
