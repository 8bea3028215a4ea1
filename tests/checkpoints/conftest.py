"""A real run whose checkpoint the tests of this folder read."""

import pytest
from runs import EMA, ema_of, make_runner


@pytest.fixture(scope='session')
def run(tmp_path_factory):
    """A run of 8 iterations with MMEngine's EMAHook and our average, a restart, and its file."""
    folder = tmp_path_factory.mktemp('run')
    ema = {**EMA, 'update_buffers': True, 'momentum': 0.2, 'gamma': 3.0}
    runner = make_runner(folder, epochs=2, ema=ema)
    runner.train()
    ema_of(runner).restart(steps=4, momentum=0.3)
    runner.save_checkpoint(str(folder), 'restarted.pth')
    return runner, ema_of(runner), folder / 'restarted.pth'


@pytest.fixture(scope='session')
def run_of_several(tmp_path_factory):
    """A run of 8 iterations with averages in also, and its file."""
    folder = tmp_path_factory.mktemp('several')
    also = dict(
        short=dict(momentum=0.5),
        restarted=dict(restart=dict(milestones=[1], gamma=7)),
        mean=dict(ema_type='mmema.RestartableUniformAverage'),
    )
    runner = make_runner(folder, epochs=2, ema={**EMA, 'type': 'mmema.EMAHook', 'also': also})
    runner.train()
    return runner, folder / 'epoch_2.pth'
