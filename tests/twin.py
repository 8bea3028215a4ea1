"""Toy runs with recorded weights, and a float64 twin of their averages."""

import contextlib
import math
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from reference import exp_momentum, tensors_of
from runs import Crash, LineModel, loader, make_runner


class BufferModel(LineModel):
    """The toy with a floating-point buffer that changes in each pass, beside BatchNorm's."""

    def __init__(self):
        super().__init__()
        self.register_buffer('level', torch.zeros(2))

    def forward(self, x, y=None, mode='tensor'):
        if mode == 'loss':
            self.level += x.mean().detach() + 1
        return super().forward(x, y, mode)


@OPTIM_WRAPPERS.register_module()
class SkippingWrapper(OptimWrapper):
    """Leaves out some of its steps, as mixed precision does where a gradient is infinite."""

    def __init__(self, *args, skipped=(), **kwargs):
        super().__init__(*args, **kwargs)
        self.skipped, self.calls = skipped, 0

    def step(self, **kwargs):
        self.calls += 1
        if self.calls not in self.skipped:
            super().step(**kwargs)


class Rows(Hook):
    """Keeps all tensors after each iteration, and whether the optimizer has made a step."""

    priority = 'VERY_HIGH'

    def __init__(self, frozen=range(0)):
        self.rows, self.frozen, self.handle = [], frozen, None

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        for parameter in runner.model.layers[0].parameters():
            parameter.requires_grad_(runner.iter not in self.frozen)
        if self.handle is None:
            optimizer = runner.optim_wrapper.optimizer
            self.handle = optimizer.register_step_post_hook(self.count)
        self.stepped = False

    def count(self, *args):
        self.stepped = True

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        tensors = {n: t.detach().double().clone() for n, t in tensors_of(runner.model).items()}
        self.rows.append(
            SimpleNamespace(
                iter=runner.iter, epoch=runner.epoch, stepped=self.stepped, tensors=tensors
            )
        )


def train(folder, *hooks, ema, parts=({},), frozen=range(0), **settings):
    """Train a toy, stopped and resumed once for each further part; return the rows of the run.

    Args:
        folder: Of the run.
        hooks: Settings of hooks.
        ema: Settings of the EMAHook.
        parts: For each start ``stop``, the iteration at which a power cut ends it, and what it
            changes: ``batch``, ``accumulation``, ``ema``.
        frozen: Iterations in which one layer is frozen.
        settings: Of `make_runner`; ``skipped`` has the calls of the optimizer that do nothing.
    """
    rows, skipped = [], settings.pop('skipped', ())
    for number, part in enumerate(parts):
        recorder = Rows(frozen)
        own = {**ema, **part.get('ema', {})}
        wrapper = dict(
            type='SkippingWrapper',
            optimizer=dict(type='SGD', lr=0.05, momentum=0.9),
            accumulative_counts=part.get('accumulation', 1),
        )
        by_epoch = settings.get('iters') is None
        length = {'max_epochs': settings.get('epochs', 6)} if by_epoch else {
            'max_iters': settings['iters']
        }  # fmt: skip
        config = dict(
            custom_hooks=[own, *hooks],
            optim_wrapper=wrapper,
            train_cfg=dict(by_epoch=by_epoch, **length),
        )
        stop = [Crash(part['stop'])] if 'stop' in part else []
        runner = make_runner(
            folder,
            *hooks,
            recorder,
            *stop,
            ema=own,
            model=BufferModel(),
            data=loader(part.get('batch', 6)),
            optim_wrapper=dict(wrapper, skipped=skipped),
            cfg=Config(config),
            resume=number > 0,
            **settings,
        )
        with contextlib.suppress(KeyboardInterrupt):
            runner.train()
        begin = recorder.rows[0].iter if recorder.rows else math.inf
        rows = [row for row in rows if row.iter < begin] + recorder.rows
    return SimpleNamespace(rows=rows, folder=Path(folder), runner=runner)


def twin(rows, *, ema, restarts=(), begin=0, best=None, changed=None):
    """Yield the average after each row: its counter, the share of each row, its last update.

    Args:
        rows: Of a whole run, in the order of time.
        ema: momentum, gamma and interval, and from which iteration on a changed one is used.
        restarts: (unit, moment, values) each; done before the first row at or after the moment.
        begin: First iteration whose weights are blended.
        best: For a restart to the best weights: returns the number of rows before them.
        changed: Iteration at which settings change, and the changes.
    """
    values, steps, done, states = dict(ema), 0, set(), []
    shares, copy_is_due, last = np.zeros(len(rows)), False, None
    for number, row in enumerate(rows):
        if changed and row.iter >= changed[0]:
            values.update(changed[1])
            changed = None
        for which, (unit, moment, new) in enumerate(restarts):
            if which in done or getattr(row, unit) < moment:
                continue
            done.add(which)
            if new.get('source') == 'best' and best(row):
                steps, shares, copy_is_due, last = states[best(row) - 1]
            if new.get('steps') is not None:
                copy_is_due |= steps == 0 and new['steps'] > 0
                steps = new['steps']
            values.update({k: v for k, v in new.items() if k in ('momentum', 'gamma')})
        if row.stepped:
            begun = row.iter >= begin
            if not begun or copy_is_due or steps == 0:
                momentum = 1.0
            elif steps % values.get('interval', 1):
                momentum = 0.0
            else:
                momentum = exp_momentum(steps, values['momentum'], values['gamma'])
            shares = shares * (1 - momentum)
            shares[number] += momentum
            last = number
            if begun:
                steps, copy_is_due = steps + 1, False
            elif not copy_is_due:
                steps = 0
        states.append((steps, shares, copy_is_due, last))
        yield steps, shares, last


def copies(name, update_buffers=False, exclude=()):
    """Whether an average copies a tensor of the toy."""
    is_buffer = name.endswith(('running_mean', 'running_var', 'level'))
    return is_buffer and not update_buffers or any(fnmatchcase(name, p) for p in exclude)


def weighted(rows, shares, name):
    return sum(float(s) * row.tensors[name] for s, row in zip(shares, rows) if s)


FLOATS = [
    *('norm.weight', 'norm.bias', 'norm.running_mean', 'norm.running_var', 'level'),
    *(f'layers.{n}.{kind}' for n in (0, 2) for kind in ('weight', 'bias')),
]


def assert_sum(state, rows, shares, last, names=FLOATS, tolerance=1e-5, **selection):
    """Assert that weights are the sum of recorded ones; copied tensors those of the last row."""
    for name in names:
        copied = copies(name, **selection)
        expected = last.tensors[name] if copied else weighted(rows, shares, name)
        torch.testing.assert_close(
            state[name].double(),
            expected,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f'{name}: {text}',
        )
