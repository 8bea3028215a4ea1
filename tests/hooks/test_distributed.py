"""Real processes with gloo: every rank decides alike, and none waits for ever."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import assert_same

TRAIN = Path(__file__).parents[1] / 'train_line.py'
LIMIT = 180
BOUND = 120  # the group's own limit is 60 seconds, and starting up takes some
PLATEAU = dict(metric='score', momentum_add=0.01)
# By epoch, as rank 0 sees it: plateaus after 2 and 4. The others see a metric that never improves.
SCRIPT = [None, 0.5, 0.4, 0.6, 0.55, 0.7, 0.8]


def launch(work_dir, ranks, **settings):
    """Start torch's launcher; return the finished job."""
    file = work_dir / 'settings.json'
    file.write_text(json.dumps(dict(settings, work_dir=str(work_dir))))
    return subprocess.run(
        [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone']
        + ['--nproc-per-node', str(ranks), str(TRAIN), str(file)],
        capture_output=True,
        timeout=LIMIT,
        env={**os.environ, 'PYTHONPATH': str(TRAIN.parent), 'OMP_NUM_THREADS': '1'},
    )


def shared(state):
    """All but the statistics of BatchNorm, which are each rank's own by design."""
    return {k: v for k, v in state.items() if 'running_' not in k}


@pytest.mark.slow
@pytest.mark.parametrize('ranks', [2, 3])
@pytest.mark.parametrize('source', ['model', 'ema', 'best'])
def test_all_ranks_end_with_the_same_bits(tmp_path, ranks, source):
    hook = dict(
        type='mmema.EMARestartHook',
        milestones=[2],
        on_plateau=PLATEAU,
        source=source,
        steps=2,
        momentum=0.04,
    )
    job = launch(tmp_path, ranks, hooks=[hook], script=SCRIPT, only_rank_0_sees=True)
    assert job.returncode == 0, job.stderr.decode()[-3000:]
    states = [torch.load(tmp_path / f'final_{rank}.pth') for rank in range(ranks)]
    assert states[0]['ema.restarts'] == 2  # the milestone falls on the first plateau
    for state in states[1:]:
        assert_same(shared(states[0]), shared(state))


@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 1])
def test_a_killed_rank_ends_the_job(tmp_path, rank):
    # Rank 1 is killed before the restart at which rank 0 waits for it, or the other way round.
    hook = dict(type='mmema.EMARestartHook', milestones=[2], source='best')
    begin = time.monotonic()
    job = launch(tmp_path, 2, hooks=[hook], die=[rank, 7])
    assert job.returncode != 0
    assert time.monotonic() - begin < BOUND
    assert not list(tmp_path.glob('final_*'))


@pytest.mark.slow
def test_an_error_on_rank_0_is_one_on_every_rank(tmp_path):
    hook = dict(type='mmema.EMARestartHook', on_plateau=dict(metric='wrong'))
    job = launch(tmp_path, 2, hooks=[hook])
    assert job.returncode != 0
    message = b"must be one of the run's metrics, got 'wrong'"
    assert job.stderr.count(message) == 2
