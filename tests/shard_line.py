"""Train a toy whose data is the same on every rank: ``shard_line.py FOLDER CASE ...``.

Started once on each rank, as a start takes seconds. Each case is a function; rank 0 writes what it
returns to ``FOLDER/CASE.pth``, or the text of its error to ``CASE.txt``.
"""

import os
import sys
import traceback
from pathlib import Path

import forks
import runs
import torch
from mmengine.hooks import Hook
from mmengine.runner import FlexibleRunner
from runs import Line, LineModel
from torch import nn

from mmema.messages import RunError
from mmema.run import ema_hook_of

WORLD = int(os.environ['WORLD_SIZE'])
SHARD = ['layers.*', 'two', 'tied']
ALSO = dict(
    short=dict(restart=dict(milestones=[2], gamma=3)),
    plateau=dict(restart=dict(on_plateau=dict(metric='score', rule='less'))),
)
OURS = dict(type='mmema.EMAHook', momentum=0.1, gamma=5, exclude=['two.*'], also=ALSO)
HOOKS = [dict(type='mmema.EMAMonitorHook', interval=1)]
SGD = dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9))
ADAM = dict(optimizer=dict(type='AdamW', lr=0.01))


class Alike(Line):
    """The points of a line, so that each rank gets what one process alone would get."""

    def __len__(self):
        return super().__len__() * WORLD

    def __getitem__(self, index):
        return super().__getitem__(index // WORLD)


class ShardModel(LineModel):
    """Uneven parts, a tied layer, frozen parameters, and buffers of each kind."""

    def __init__(self):
        super().__init__()
        self.two = nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 3))
        self.tied = nn.ModuleDict(dict(a=nn.Linear(3, 3)))
        self.tied.b = self.tied['a']
        self.tied = Twice(self.tied['a'])
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer('cache', torch.rand(3), persistent=False)

    def forward(self, x, y=None, mode='tensor'):
        self.cache = self.cache + 1 if self.training else self.cache
        return super().forward(self.tied(self.two(x)) * self.frozen, y, mode)


class Twice(nn.Module):
    """Two layers that are one, as the heads of RTMDet."""

    def __init__(self, layer):
        super().__init__()
        self.first = self.second = layer

    def forward(self, x):
        return self.second(self.first(x))


class Restart(Hook):
    """Restarts the average by hand, after an iteration."""

    def __init__(self, iteration, **arguments):
        self.iteration = iteration
        self.arguments = arguments

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.iteration:
            ema_hook_of(runner).ema_model.restart(**self.arguments)


def runner_of(folder, *hooks, strategy=None, epochs=4, split=False, **settings):
    settings = {
        'ema': OURS,
        'model': ShardModel(),
        'optim_wrapper': dict(ADAM),
        'val_cfg': dict(type='mmema.EMAValLoop'),
        'launcher': 'none' if strategy is None else 'pytorch',
        **settings,
    }
    strategy = strategy or dict(type='SingleDeviceStrategy')
    runs.Runner = FlexibleRunner
    alike, runs.Line = runs.Line, Line if split else Alike
    runs.loader.__defaults__ = (6, False, *runs.loader.__defaults__[2:])
    try:
        return runs.make_runner(folder, *hooks, strategy=strategy, epochs=epochs, **settings)
    finally:
        runs.Line = alike


def train(*args, **settings):
    runner = runner_of(*args, **settings)
    runner.train()
    return runner


def fully_shard(**arguments):
    return dict(type='mmema.FullyShardStrategy', **{'shard': SHARD, **arguments})


def single(folder):
    """One process, for the others to repeat bit by bit."""
    train(folder, *HOOKS)


def sharded(folder):
    train(folder, *HOOKS, strategy=fully_shard())


CASES = {name: value for name, value in globals().items() if callable(value)}


def main(folder, names):
    torch.set_num_threads(1)
    if WORLD > 1 or 'group' in os.environ:
        forks.join_ranks()
    is_first = os.environ['RANK'] == '0'
    for name in names:
        try:
            result = CASES[name](folder / name)
            if is_first:
                torch.save(result, folder / f'{name}.pth')
        except Exception as error:
            if is_first:
                text = str(error) if isinstance(error, RunError) else traceback.format_exc()
                (folder / f'{name}.txt').write_text(text)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main(Path(sys.argv[1]), sys.argv[2:])
