"""Random configurations: each trains, or is refused by a message that names what is wrong."""

import logging
import math

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from marks import SEED
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from runs import Clock, Line, LineModel
from torch.utils.data import DataLoader

BAD = st.sampled_from([0, -1, 1.5, math.nan, math.inf, '0.1', True, [], {}, 'model'])
ITERATIONS = 12  # of 4 epochs


def mostly(good):
    """A good value nine times out of ten."""
    return st.integers(0, 9).flatmap(lambda n: good if n else BAD)


def some(**fields):
    """A dict of any of the fields."""
    return st.fixed_dictionaries({}, optional={k: mostly(v) for k, v in fields.items()})


UNIT = st.floats(0.001, 0.999)
EMA = some(
    momentum=UNIT,
    gamma=st.floats(0.01, 1e4),
    interval=st.integers(1, 4),
    update_buffers=st.booleans(),
)
HOOK = some(
    milestones=st.lists(st.integers(1, 14), max_size=3, unique=True).map(sorted),
    every=st.integers(1, 9),
    by_epoch=st.booleans(),
    steps=st.one_of(st.none(), st.integers(0, 10**6)),
    momentum=st.one_of(st.none(), UNIT, st.lists(UNIT, min_size=1, max_size=3)),
    gamma=st.floats(0.01, 1e4),
    source=st.sampled_from(['model', 'ema', 'best']),
    on_plateau=some(
        metric=st.just('score'), patience=st.integers(1, 3), momentum_add=UNIT, max_momentum=UNIT
    ),
    follow=st.just('PipelineSwitchHook'),
)
NAMES = {
    *('momentum', 'gamma', 'interval', 'update_buffers', 'milestone', 'every', 'by_epoch', 'steps'),
    *('source', 'on_plateau', 'follow', 'EMARestartHook must have a trigger'),
}
RULES = ('must', 'needs', 'unexpected keyword', 'missing', 'can only')


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    pytest.importorskip('mmdet')
    logger = MMLogger.get_instance('random', log_level=logging.CRITICAL)
    return tmp_path_factory.mktemp('random'), DataLoader(Line(12), batch_size=4), logger


def train(parts, by_epoch, ema, hook):
    work_dir, data, _ = parts
    model = LineModel()
    train.count += 1
    runner = Runner(
        model,
        work_dir=str(work_dir),
        train_dataloader=data,
        train_cfg=dict(by_epoch=True, max_epochs=4)
        if by_epoch
        else dict(by_epoch=False, max_iters=ITERATIONS),
        optim_wrapper=dict(optimizer=torch.optim.SGD(model.parameters(), lr=0.01)),
        val_dataloader=data,
        val_cfg=dict(),
        val_evaluator=dict(
            type='Score', script=[0.1 * math.cos(time) for time in range(ITERATIONS + 1)]
        ),
        default_hooks=dict(
            timer=None,
            logger=None,
            param_scheduler=None,
            sampler_seed=None,
            # Writing files is what takes the time, so only where a best one may be asked for.
            checkpoint=dict(type='CheckpointHook', save_best='score', rule='greater')
            if hook.get('source') == 'best'
            else None,
        ),
        custom_hooks=[
            dict(type='EMAHook', ema_type='mmema.RestartableExpMomentumEMA', **ema),
            dict(type='mmema.EMARestartHook', **hook),
            dict(type='mmdet.PipelineSwitchHook', switch_epoch=2, switch_pipeline=[]),
            Clock(),
        ],
        experiment_name=f'random_{train.count}',
        log_level='CRITICAL',
    )
    runner.train()
    return next(h.ema_model for h in runner.hooks if hasattr(h, 'ema_model'))


train.count = 0


def moments(by_epoch, hook):
    """The iterations at which a hook by itself should restart."""
    unit = 3 if hook.get('by_epoch', True) else 1
    times = {at * unit for at in hook.get('milestones', [])}
    if hook.get('every'):
        times |= set(range(hook['every'] * unit, ITERATIONS, hook['every'] * unit))
    if hook.get('follow'):
        times.add(6)
    return {at for at in times if at < ITERATIONS}


SETTINGS = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
DRAWN = given(by_epoch=st.booleans(), ema=EMA, hook=HOOK)


@pytest.mark.slow
@settings(max_examples=300, derandomize=True, **SETTINGS)
@DRAWN
def test_it_trains_or_says_what_is_wrong(parts, by_epoch, ema, hook):
    check(parts, by_epoch, ema, hook)


@pytest.mark.extensive
@seed(SEED)
@settings(max_examples=5000, derandomize=False, **SETTINGS)
@DRAWN
def test_many_train_or_say_what_is_wrong(parts, by_epoch, ema, hook):
    check(parts, by_epoch, ema, hook)


def check(parts, by_epoch, ema, hook):
    try:
        average = train(parts, by_epoch, ema, hook)
    except (TypeError, ValueError) as error:
        message = str(error)
        assert any(name in message for name in NAMES), message
        assert any(rule in message for rule in RULES), message
        assert 'got' in message or 'missing' in message or 'unexpected' in message, message
        return
    expected = len(moments(by_epoch, hook))
    assert average.restarts >= expected if hook.get('on_plateau') else average.restarts == expected
    assert all(torch.isfinite(p).all() for p in average.parameters())
