#!/usr/bin/env python3
"""Train a small network on handwritten digits, with MMEngine and torch alone.

The average of its weights restarts where the learning rate falls. The digits come inside
scikit-learn, which it needs besides.

examples/mmengine_digits.py --work-dir work_dirs/mmengine
"""

import argparse

import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import mmema  # noqa: F401  # registers its hooks, and lets torch read MMEngine's checkpoints


class Net(BaseModel):
    """Two convolutions with BatchNorm, for pictures of 8 by 8 pixels."""

    def __init__(self, width=16):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * width, 10),
        )

    def forward(self, images, labels=None, mode='tensor'):
        scores = self.layers(images)
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(scores, labels))
        return [scores.argmax(1) == labels] if mode == 'predict' else scores


class Accuracy(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        return dict(accuracy=torch.cat(results).float().mean().item())


def digits(train):
    """Return four fifths of the digits for training, or the others."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    labels = torch.from_numpy(data.target)
    last = len(labels) // 5 * 4
    part = slice(last) if train else slice(last, None)
    return TensorDataset(images[part], labels[part])


def loader(train):
    return dict(
        batch_size=32,
        dataset=digits(train),
        sampler=dict(type='DefaultSampler', shuffle=train),
        collate_fn=dict(type='default_collate'),
    )


def make_runner(work_dir, epochs=12, drop=8):
    """Return a run whose learning rate falls before the epoch with index ``drop``."""
    return Runner(
        model=dict(type=Net),  # built once the seed is set
        work_dir=work_dir,
        train_dataloader=loader(train=True),
        val_dataloader=loader(train=False),
        val_evaluator=dict(type=Accuracy),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.5)),
        param_scheduler=dict(type='MultiStepLR', milestones=[drop], gamma=0.1),
        custom_hooks=[
            dict(type='mmema.EMAHook', momentum=0.01, gamma=20, update_buffers=True),
            dict(type='mmema.EMARestartHook', milestones=[drop], gamma=10),
        ],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', save_best='accuracy')),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        val_cfg=dict(type='mmema.EMAValLoop'),  # raw weights beside the averaged ones
        randomness=dict(seed=0),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work-dir', default='work_dirs/mmengine', help='folder of the run')
    make_runner(parser.parse_args().work_dir).train()


if __name__ == '__main__':
    main()
