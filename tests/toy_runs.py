"""Small real runs: a Runner of MMEngine, a model of two layers, eight samples."""

import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

import mmema  # noqa: F401


class Samples(torch.utils.data.Dataset):
    """Numbers, each seen through random noise, as augmented pictures are."""

    def __init__(self, noise=0.0, length=8):
        self.noise = noise
        self.length = length
        self.seen = []  # as a cached Mosaic keeps pictures

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.seen.append(index)
        shift = self.noise * (random.random() + np.random.rand() + float(torch.rand(())))
        x = torch.tensor([float(index), float(index % 3)]) + shift
        return x, x.sum()


class Model(BaseModel):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.dropout = nn.Dropout(dropout)
        self.unused = nn.BatchNorm1d(2)
        self.register_buffer('passes', torch.tensor(0))

    def forward(self, x, y, mode='tensor'):
        if self.training:
            self.passes += 1
        out = self.dropout(self.norm(self.linear(x))).sum(1)
        if mode == 'loss':
            return {'loss': F.mse_loss(out, y)}
        return [*out] if mode == 'predict' else out


class Mean(BaseMetric):
    """The mean prediction; nothing at all where ``silent`` says so."""

    default_prefix = 'toy'

    def __init__(self, silent=lambda weights: False, **kwargs):
        super().__init__(**kwargs)
        self.silent = silent

    def process(self, data_batch, data_samples):
        self.results += [float(sample) for sample in data_samples]

    def compute_metrics(self, results):
        if self.silent(results):
            return {}
        return {'mean': float(np.mean(results)), 'accuracy': float(np.max(results))}


def loader(noise=0.0, batch_size=4, shuffle=False, length=8, **kwargs):
    return dict(
        batch_size=batch_size,
        num_workers=0,
        dataset=Samples(noise, length),
        sampler=dict(type='DefaultSampler', shuffle=shuffle),
        collate_fn=dict(type='default_collate'),
        **kwargs,
    )


def ema(**kwargs):
    settings = dict(ema_type='mmema.RestartableExpMomentumEMA', momentum=0.1, gamma=1)
    return {'type': 'EMAHook', **settings, **kwargs}


def make_runner(folder, hooks, dropout=0.0, epochs=3, **kwargs):
    torch.manual_seed(0)
    settings = dict(
        model=Model(dropout),
        work_dir=str(folder),
        train_dataloader=loader(noise=0.1, shuffle=True),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05)),
        val_dataloader=loader(),
        val_cfg=dict(),
        val_evaluator=[Mean()],
        custom_hooks=hooks,
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
        randomness=dict(seed=3),
        default_scope='mmengine',
        experiment_name=f'{folder.name}{random.Random(str(folder)).random()}',
    )
    return Runner(**{**settings, **kwargs})


def points(runner):
    """What the run wrote for its curves, point by point."""
    path = Path(runner._log_dir) / 'vis_data' / 'scalars.json'
    return [json.loads(line) for line in path.read_text().splitlines()]
