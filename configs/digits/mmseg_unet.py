# UNet of MMSegmentation, an eighth as wide, finds the pixels of the digits. A run by iterations, as
# usual there; its average restarts where the learning rate falls.
_base_ = [
    'mmseg::_base_/models/fcn_unet_s5-d16.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/digits.py',
]

max_iters, drop = 300, 200

width = 8  # the stock model has 64
norm = dict(type='BN', requires_grad=True)  # the stock SyncBN needs GPUs
model = dict(
    data_preprocessor=dict(size=_base_.digits_scale),
    backbone=dict(base_channels=width, norm_cfg=norm),
    decode_head=dict(in_channels=width, channels=width, norm_cfg=norm),
    auxiliary_head=dict(in_channels=2 * width, channels=width, norm_cfg=norm),
    test_cfg=dict(_delete_=True, mode='whole'),
)

load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
train_pipeline = [
    *load,
    dict(type='RandomResize', scale=_base_.digits_scale, ratio_range=(1.0, 1.25), keep_ratio=True),
    dict(type='RandomCrop', crop_size=_base_.digits_scale),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
dataset = dict(
    type='BaseSegDataset',
    data_root=_base_.digits_root,
    data_prefix=dict(img_path='train', seg_map_path='masks/train'),
    img_suffix='.png',
    metainfo=dict(classes=('photograph', 'digit')),
    pipeline=train_pipeline,
)
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dataset,
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        dataset,
        data_prefix=dict(img_path='val', seg_map_path='masks/val'),
        pipeline=[*load, dict(type='PackSegInputs')],
    ),
)
test_dataloader = dict(
    val_dataloader,
    dataset=dict(
        val_dataloader['dataset'],
        data_prefix=dict(img_path='test', seg_map_path='masks/test'),
    ),
)
val_evaluator = test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])

optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.004, weight_decay=0.01))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='MultiStepLR', by_epoch=False, milestones=[drop], gamma=0.1),
]
custom_hooks = [
    dict(type='mmema.EMAHook', momentum=0.05, gamma=20, update_buffers=True),
    dict(type='mmema.EMARestartHook', by_epoch=False, milestones=[drop], gamma=10),
]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=20, log_metric_by_epoch=False),
    checkpoint=dict(
        type='CheckpointHook', by_epoch=False, interval=100, max_keep_ckpts=2, save_best='mIoU'
    ),
)
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=50)
val_cfg = dict(type='mmema.EMAValLoop')  # raw weights beside the averaged ones
test_cfg = dict(type='TestLoop')
randomness = dict(seed=0)
