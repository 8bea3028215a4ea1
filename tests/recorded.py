"""Toy runs that record their raw weights, and sums of these in float64."""

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from runs import LineModel, loader, plain_runner

STOCK = dict(type='EMAHook', ema_type='mmdet.ExpMomentumEMA', momentum=0.1, gamma=8)


class Record(Hook):
    """Keeps a copy of all tensors of the model after each iteration."""

    priority = 'VERY_HIGH'

    def __init__(self):
        self.states = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        state = runner.model.state_dict()
        self.states.append({n: t.double() if t.is_floating_point() else t.clone()
                            for n, t in state.items()})  # fmt: skip


class Recorded:
    """A run's folder, runner, and raw weights after each iteration."""

    def __init__(self, runner, states):
        self.runner, self.states = runner, states
        self.folder = runner.work_dir

    def file(self, epoch):
        return f'{self.folder}/epoch_{epoch}.pth'

    def sum(self, shares):
        """Return the sum of the raw weights after each iteration, each times its share."""
        total = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in self.states[0].items()}
        for share, state in zip(shares, self.states):
            for name, tensor in state.items():
                total[name] += share * tensor
        return total


def record(folder, ema, *hooks, epochs=6, model=None, optim_wrapper=None, **settings):
    """Train a toy whose checkpoints carry a config, as those of `tools/train.py` do."""
    library, _, _ = ema.get('ema_type', '').rpartition('.')
    if library in ('mmdet', 'mmyolo'):
        pytest.importorskip(f'{library}.models')  # registers its averages
    optim_wrapper = optim_wrapper or dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9))
    config = Config(
        dict(
            custom_hooks=[dict(ema), *map(dict, hooks)],
            optim_wrapper=dict(optim_wrapper),
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
        )
    )
    recorder = Record()
    runner = plain_runner(
        folder,
        [dict(ema), *hooks, recorder],
        model=model or LineModel(),
        train_dataloader=loader(),
        train_cfg=dict(by_epoch=True, max_epochs=epochs, val_interval=epochs),
        cfg=config,
        optim_wrapper=optim_wrapper,
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        val_dataloader=loader(shuffle=False),
        val_evaluator=dict(type='Score'),
        **settings,
    )
    runner.train()
    return Recorded(runner, recorder.states)


def shares_of(momenta):
    """Return the share of each update in the average after the last one, one by one."""
    shares = []
    for m in momenta:
        shares = [share * (1 - m) for share in shares] + [m]
    return shares


def parameters(state):
    """Return the tensors that averages blend: neither BatchNorm's nor the model's buffers."""
    buffers = ('running_mean', 'running_var', 'num_batches_tracked', 'calls')
    return {name: tensor for name, tensor in state.items() if not name.endswith(buffers)}
