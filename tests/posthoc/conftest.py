"""Real runs whose raw weights are recorded after every iteration."""

import pytest
import recorded


@pytest.fixture(scope='session')
def stock(tmp_path_factory):
    """A run of 6 epochs of 4 iterations with MMDetection's average, in its warm-up; every epoch."""
    return recorded.record(tmp_path_factory.mktemp('stock'), recorded.STOCK)


@pytest.fixture(scope='session')
def ours(tmp_path_factory):
    """A run of 6 epochs with our average, a restart before epoch 3, and three others in also."""
    hook = {
        'type': 'mmema.EMAHook',
        'momentum': 0.15,
        'gamma': 3,
        'also': dict(
            long=dict(ema_type='mmema.RestartableDebiasedEMA', momentum=0.02),
            sparse=dict(interval=3, update_buffers=True),
            restarted=dict(ema_type='mmema.RestartableDebiasedEMA', restart=dict(milestones=[2])),
        ),
    }
    restart = dict(type='mmema.EMARestartHook', milestones=[3], steps=2, momentum=0.3)
    return recorded.record(tmp_path_factory.mktemp('ours'), hook, restart)
