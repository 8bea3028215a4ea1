"""A small, real Runner: a model with BatchNorm that learns a line, trained in milliseconds."""

import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import mmengine.runner.loops
import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mmema.record import Record
from mmema.run import averages_of, ema_hook_of

# A run by iterations waits for two seconds at the end of each epoch; ours have four iterations.
mmengine.runner.loops.time = SimpleNamespace(sleep=lambda seconds: None)

EMA = dict(type='EMAHook', ema_type='mmema.RestartableExpMomentumEMA', momentum=0.1, gamma=5)


def ema(**changes):
    return {**EMA, **changes}


@DATASETS.register_module()
class Line(Dataset):
    """Points of a noisy line; with ``noise`` each is seen elsewhere, as augmented pictures are."""

    def __init__(self, length=24, noise=0.0, pipeline=None, ann_file=''):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(length, 3, generator=generator)
        self.y = self.x.sum(1, keepdim=True) + torch.randn(length, 1, generator=generator) / 3
        self.noise = noise
        self.seen = []  # as a cached Mosaic keeps pictures

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.seen.append(index)
        x = self.x[index]
        if self.noise:
            x = x + self.noise * (random.random() + np.random.rand() + float(torch.rand(())))
        return dict(x=x, y=self.y[index])


@MODELS.register_module()
class LineModel(BaseModel):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.BatchNorm1d(3)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        self.register_buffer('calls', torch.tensor(0))

    def forward(self, x, y=None, mode='tensor'):
        out = self.layers(self.norm(x))
        if mode == 'loss':
            self.calls += 1
            return dict(loss=(out - y).square().mean())
        return [dict(error=(out - y).square())] if mode == 'predict' else out


class NormModel(LineModel):
    """A norm behind a layer, one that no data reaches, dropout, and a count of training passes."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.dropout = nn.Dropout(dropout)
        self.unused = nn.BatchNorm1d(3)
        self.register_buffer('passes', torch.tensor(0))

    def forward(self, x, y=None, mode='tensor'):
        if self.training:
            self.passes += 1
        return super().forward(self.dropout(self.linear(x)), y, mode)


@METRICS.register_module()
class Score(BaseMetric):
    """Minus the mean error; or scripted: ``script[time of the run]``, None for no metric."""

    now = None

    def __init__(self, script=None):
        super().__init__()
        self.script = script

    def process(self, data_batch, data_samples):
        self.results.extend(sample['error'] for sample in data_samples)

    def compute_metrics(self, results):
        if self.script is not None:
            score = self.script[Score.now]
            return {} if score is None else dict(score=score)
        return dict(score=-torch.cat(results).mean().item())


class Mean(BaseMetric):
    """Two numbers under a prefix; none where ``silent`` says so."""

    default_prefix = 'toy'

    def __init__(self, silent=lambda results: False):
        super().__init__()
        self.silent = silent

    def process(self, data_batch, data_samples):
        self.results += [float(error) for sample in data_samples for error in sample['error']]

    def compute_metrics(self, results):
        if self.silent(results):
            return {}
        return {'mean': float(np.mean(results)), 'worst': float(np.max(results))}


@HOOKS.register_module()
class Clock(Hook):
    """Tells the scripted metric the time, and records what the average does."""

    priority = 'LOWEST'

    def __init__(self):
        self.seen = []

    def before_val(self, runner):
        by_iter = type(runner.train_loop).__name__ == 'IterBasedTrainLoop'
        Score.now = runner.iter if by_iter else runner.epoch

    def after_train_epoch(self, runner):
        # An evaluation without hooks can come before that with them.
        if type(runner.train_loop).__name__ != 'IterBasedTrainLoop':
            Score.now = runner.epoch + 1

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if type(runner.train_loop).__name__ == 'IterBasedTrainLoop':
            Score.now = runner.iter + 1
        ema = ema_of(runner)
        restarts = getattr(ema, 'restarts', 0)
        self.seen.append((runner.iter, int(ema.steps), getattr(ema, 'momentum', None), restarts))


class Crash(Hook):
    """Stops a run as a power cut would, at one of the places where it can be."""

    def __init__(self, iteration, place='after_train_iter'):
        self.iteration = iteration
        setattr(self, place, self.crash)

    priority = 'LOWEST'

    def crash(self, runner, *args, **kwargs):
        if runner.iter >= self.iteration:
            raise KeyboardInterrupt


def ema_of(runner):
    return next(hook.ema_model for hook in runner.hooks if hasattr(hook, 'ema_model'))


def loader(batch_size=6, shuffle=True, length=24, noise=0.0, **settings):
    return dict(
        batch_size=batch_size,
        num_workers=0,
        dataset=Line(length, noise),
        sampler=dict(type='DefaultSampler', shuffle=shuffle),
        collate_fn=dict(type='default_collate'),
        **settings,
    )


def plain_runner(work_dir, hooks, epochs=3, **settings):
    """Return a Runner of 2 iterations an epoch with these hooks and no others."""
    settings = {
        'model': NormModel(),
        'train_dataloader': loader(4, length=8, noise=0.1),
        'train_cfg': dict(by_epoch=True, max_epochs=epochs),
        'optim_wrapper': dict(optimizer=dict(type='SGD', lr=0.05)),
        'val_dataloader': loader(4, length=8, shuffle=False),
        'val_cfg': dict(),
        'val_evaluator': [Mean()],
        'default_hooks': dict(logger=dict(type='LoggerHook', interval=1)),
        'randomness': dict(seed=0),
        **settings,
    }
    return Runner(
        work_dir=str(work_dir),
        custom_hooks=hooks,
        experiment_name=f'{Path(work_dir).name}_{next(_number)}',
        **settings,
    )


def make_runner(
    work_dir,
    *hooks,
    epochs=6,
    iters=None,
    ema=EMA,
    script=None,
    val_interval=1,
    checkpoint=None,
    model=None,
    val_cfg=None,
    data=None,
    **settings,
):
    """Return a Runner of 4 iterations an epoch; ``iters`` makes it one by iterations."""
    by_epoch = iters is None
    checkpoint = {
        'type': 'CheckpointHook',
        'interval': 1,
        'by_epoch': by_epoch,
        'save_best': 'score',
        'rule': 'greater',
        **(checkpoint or {}),
    }
    train_cfg = (
        dict(by_epoch=True, max_epochs=epochs, val_interval=val_interval)
        if by_epoch
        else dict(by_epoch=False, max_iters=iters, val_interval=val_interval)
    )
    settings = {
        'optim_wrapper': dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9)),
        'param_scheduler': dict(type='ExponentialLR', gamma=0.95, by_epoch=by_epoch),
        'train_dataloader': data or loader(),
        **settings,
    }
    return plain_runner(
        work_dir,
        [dict(ema), *hooks, dict(type='Clock')],
        model=model or LineModel(),
        train_cfg=train_cfg,
        val_dataloader=data or loader(shuffle=False),
        val_cfg=val_cfg or dict(),
        val_evaluator=dict(type='Score', script=script),
        default_hooks=dict(checkpoint=checkpoint, logger=dict(type='LoggerHook', interval=2)),
        **settings,
    )


_number = itertools.count()


def state_of(runner):
    """All tensors of a run: raw, of every average, and the optimizer's."""
    state = {f'raw.{name}': t.clone() for name, t in runner.model.state_dict().items()}
    for name, average in averages_of(ema_hook_of(runner)).items():
        tensors = average.state_dict().items()
        state.update({f'{name}.{key}': tensor.clone() for key, tensor in tensors})
    for index, slots in runner.optim_wrapper.optimizer.state_dict()['state'].items():
        # SGD of torch 2.0 has None for the momentum of a parameter without a gradient.
        slots = {name: slot for name, slot in slots.items() if slot is not None}
        state.update({f'optimizer.{index}.{name}': t.clone() for name, t in slots.items()})
    return state


def history_in(record):
    """Return the updates in the record in a tensor, without what a hook has said of them."""
    left_out = ('parts', 'events', 'iterations')
    return {k: v for k, v in vars(Record.decode(record)).items() if k not in left_out}


def assert_same(first, second):
    assert set(first) == set(second)
    for name, value in first.items():
        other = second[name]
        if name.rpartition('.')[2] == 'record':
            value, other = history_in(value), history_in(other)
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, f'{name}: {value} is not {other}'


def predicted(state, runner):
    """The score worked out by hand with the given weights."""
    model = LineModel()
    model.load_state_dict(state)
    model.eval()
    data = runner.val_dataloader.dataset
    with torch.no_grad():
        return -(model(data.x) - data.y).square().mean().item()


def seen(runner):
    """What the clock recorded: (iteration, steps, momentum, restarts) after each update."""
    return next(hook for hook in runner.hooks if isinstance(hook, Clock)).seen


def log_of(runner):
    return ''.join(file.read_text() for file in Path(runner.work_dir).rglob('*.log'))


def points(runner):
    """What the run wrote for its curves, point by point."""
    path = Path(runner._log_dir) / 'vis_data' / 'scalars.json'
    return [json.loads(line) for line in path.read_text().splitlines()]
