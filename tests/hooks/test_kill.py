"""A training process that is killed again and again ends with the bits of one that was not."""

import contextlib
import json
import random
import shutil
import signal
import time
from pathlib import Path

import forks
import pytest
import torch
from marks import SEED, extensive
from runs import assert_same

SCRIPT = Path(__file__).parents[1] / 'train_line.py'


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
    'ladder': dict(
        epochs=12,
        ema=dict(type='mmema.EMAHook', horizon=[f'{n} updates' for n in (2, 4, 8, 16, 30)]),
        hooks=[hook(milestones=[5], source='best')],
        checkpoint=dict(max_keep_ckpts=2),
    ),
    'also': dict(
        epochs=12,
        ema=dict(
            type='mmema.EMAHook',
            momentum=0.1,
            gamma=8,
            also=dict(
                hard=dict(restart=dict(milestones=[3, 7], gamma=5)),
                soft=dict(update_buffers=True, restart=dict(every=3, steps=4)),
                plateau=dict(restart=dict(on_plateau=dict(PLATEAU, rule='less'))),
                mean=dict(ema_type='mmema.RestartableUniformAverage', interval=2),
            ),
        ),
        val_cfg=dict(type='mmema.EMAValLoop'),
        checkpoint=dict(max_keep_ckpts=2),
    ),
}


def start(work_dir, settings, **more):
    work_dir.mkdir(exist_ok=True)
    file = work_dir / 'settings.json'
    file.write_text(json.dumps(dict(settings, work_dir=str(work_dir), **more)))
    return forks.start(SCRIPT, file, folder=work_dir, out=work_dir / 'output.txt')


def finish(process, work_dir):
    assert process.wait() == 0, (work_dir / 'output.txt').read_text()[-3000:]
    return torch.load(work_dir / 'final_0.pth')


def sizes(work_dir, pattern):
    found = {}
    for file in work_dir.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # removed just now
            found[file] = file.stat().st_size
    return found


def kill_in_training(process, work_dir, chance):
    """Kill the process at a random moment, half of the time while it writes a checkpoint."""
    at_write = chance.random() < 0.5
    pattern, times = ('*.pth', chance.randint(1, 4)) if at_write else ('pace', chance.randint(1, 6))
    before = sizes(work_dir, pattern)
    while process.poll() is None and times:
        time.sleep(0.001)
        now = sizes(work_dir, pattern)
        if any(before.get(file) != size for file, size in now.items()):
            before, times = now, times - 1
    if not at_write:
        time.sleep(chance.uniform(0, 0.03))
    process.kill()
    return process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(
    'kills, seed', [(6, 0), *extensive([(6, 1), *((40, SEED + i) for i in range(4))])]
)
@pytest.mark.parametrize('name', RUNS)
def test_killed_at_random_moments(tmp_path, name, seed, kills):
    settings, chance = RUNS[name], random.Random(seed)
    whole = finish(start(tmp_path / 'whole', settings), tmp_path / 'whole')
    work_dir, killed = tmp_path / 'killed', 0
    while killed < kills:
        process = start(work_dir, settings, resume=True, slow=0.02)
        if kill_in_training(process, work_dir, chance):
            killed += 1
        else:  # it was at its end before
            assert_same(whole, finish(process, work_dir))
            shutil.rmtree(work_dir)
    end = finish(start(work_dir, settings, resume=True), work_dir)
    assert_same(whole, end)


@pytest.mark.slow
def test_killed_while_the_last_checkpoint_was_written(tmp_path):
    # MMEngine writes in place: cut the file as a kill in the middle of a write leaves it.
    settings = RUNS['epochs']
    whole = finish(start(tmp_path / 'whole', settings), tmp_path / 'whole')
    work_dir = tmp_path / 'cut'
    assert start(work_dir, settings, die=[0, 20]).wait() == -signal.SIGKILL
    last = work_dir / 'epoch_5.pth'
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    assert_same(whole, finish(start(work_dir, settings, resume=True), work_dir))
