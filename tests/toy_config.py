"""A config of the toy of runs.py, for the tools: written to a file, and trained."""

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

TEXT = """
custom_imports = dict(imports=['runs'])
model = dict(type='LineModel')
model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None)
loader = dict(
    batch_size=4,
    num_workers=0,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
train_dataloader = dict(dataset=dict(type='Line', length=16), **loader)
val_dataloader = dict(dataset=dict(type='Line', length=8, ann_file='val'), **loader)
test_dataloader = dict(dataset=dict(type='Line', length=12, ann_file='test'), **loader)
val_evaluator = test_evaluator = dict(type='Score')
val_cfg = dict(type='mmema.EMAValLoop')
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9))
train_cfg = dict(by_epoch=True, max_epochs=6, val_interval=6)
custom_hooks = [
    dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.1),
    dict(type='mmdet.PipelineSwitchHook', switch_epoch=4, switch_pipeline=[]),
    dict(type='mmema.EMAMonitorHook'),
]
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', interval=1, save_best='score', rule='greater')
)
randomness = dict(seed=0)
"""


def write(folder, text=TEXT):
    pytest.importorskip('mmdet.engine')  # PipelineSwitchHook
    file = folder / 'toy.py'
    file.write_text(text)
    return file


def train(folder):
    """Train the toy of 6 epochs of 4 iterations; return its runner and the config's file."""
    file = write(folder)
    config = Config.fromfile(file)
    config.work_dir = str(folder / 'w')
    runner = Runner.from_cfg(config)
    runner.train()
    return runner, file
