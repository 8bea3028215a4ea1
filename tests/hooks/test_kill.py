"""A training process that is killed again and again ends with the bits of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import assert_same

SCRIPT = Path(__file__).parents[1] / 'train_line.py'
LIMIT = 120  # seconds that a process may take, with much to spare


def hook(**arguments):
    return dict(type='mmema.EMARestartHook', **arguments)


PLATEAU = dict(metric='score', momentum_add=0.01)
RUNS = {
    'epochs': dict(
        epochs=12,
        hooks=[hook(milestones=[3, 7], source='best', steps=2, on_plateau=PLATEAU)],
        checkpoint=dict(max_keep_ckpts=2),
    ),
    'iterations': dict(
        iters=48,
        val_interval=4,
        hooks=[hook(every=9, by_epoch=False, momentum=0.04, source='ema')],
        checkpoint=dict(interval=3, max_keep_ckpts=2),
    ),
}


def start(work_dir, settings, **more):
    work_dir.mkdir(exist_ok=True)
    file = work_dir / 'settings.json'
    file.write_text(json.dumps(dict(settings, work_dir=str(work_dir), **more)))
    with (work_dir / 'output.txt').open('ab') as output:
        return subprocess.Popen(
            [sys.executable, '-W', 'ignore', SCRIPT, file],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, 'PYTHONPATH': str(SCRIPT.parent)},
        )


def finish(process, work_dir):
    assert process.wait(LIMIT) == 0, (work_dir / 'output.txt').read_text()[-3000:]
    return torch.load(work_dir / 'final_0.pth')


def sizes(work_dir, pattern):
    return {file: file.stat().st_size for file in work_dir.rglob(pattern) if file.exists()}


def kill_in_training(process, work_dir, chance):
    """Kill the process at a random moment, half of the time while it writes a checkpoint."""
    at_write = chance.random() < 0.5
    pattern = '*.pth' if at_write else '*.log'
    before, deadline = sizes(work_dir, pattern), time.monotonic() + LIMIT
    writes = chance.randint(1, 4) if at_write else 1
    while process.poll() is None and writes and time.monotonic() < deadline:
        now = sizes(work_dir, pattern)
        if any(before.get(file) != size for file, size in now.items()):
            before, writes = now, writes - 1
    if not at_write:
        time.sleep(chance.uniform(0, 1.5))
    process.send_signal(signal.SIGKILL)
    return process.wait(LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('name', RUNS)
def test_killed_at_random_moments(tmp_path, name, seed):
    settings, chance = RUNS[name], random.Random(seed)
    whole = finish(start(tmp_path / 'whole', settings), tmp_path / 'whole')
    work_dir, killed = tmp_path / 'killed', 0
    for _ in range(6):
        process = start(work_dir, settings, resume=True, slow=0.02)
        killed += kill_in_training(process, work_dir, chance) == -signal.SIGKILL
        (work_dir / 'final_0.pth').unlink(missing_ok=True)
    assert killed >= 5
    end = finish(start(work_dir, settings, resume=True), work_dir)
    assert_same(whole, end)


@pytest.mark.slow
def test_killed_while_the_last_checkpoint_was_written(tmp_path):
    # MMEngine writes in place: cut the file as a kill in the middle of a write leaves it.
    settings = RUNS['epochs']
    whole = finish(start(tmp_path / 'whole', settings), tmp_path / 'whole')
    work_dir = tmp_path / 'cut'
    assert start(work_dir, settings, die=[0, 20]).wait(LIMIT) == -signal.SIGKILL
    last = work_dir / 'epoch_5.pth'
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    assert_same(whole, finish(start(work_dir, settings, resume=True), work_dir))
