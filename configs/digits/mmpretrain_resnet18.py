# ResNet-18 of MMPretrain, a quarter as wide, classifies the digits cut out of their photographs.
# Its average restarts where the augmentation of pictures and batches ends.
_base_ = [
    'mmpretrain::_base_/models/resnet18_cifar.py',
    'mmpretrain::_base_/default_runtime.py',
    '../_base_/digits.py',
]

max_epochs, plain_epochs = 12, 4  # the last ones, without augmentation

width = 16  # the stock model has 64
model = dict(
    data_preprocessor=dict(num_classes=10, mean=[125] * 3, std=[55] * 3, to_rgb=True),
    backbone=dict(stem_channels=width, base_channels=width),
    # Mixed labels are shares of classes, and stay so after the augmentation.
    head=dict(in_channels=8 * width, loss=dict(use_soft=True)),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)

load = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(32, 32))]
train_pipeline = [
    *load,
    dict(type='RandomCrop', crop_size=32, padding=4, padding_mode='reflect'),
    dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.4),
    dict(type='RandomErasing', erase_prob=0.25, mode='rand'),
    dict(type='PackInputs'),
]
plain_pipeline = [*load, dict(type='PackInputs')]

train_dataloader = dict(
    batch_size=64,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CustomDataset',
        data_root=_base_.digits_root,
        data_prefix='crops/train',
        metainfo=_base_.digits_metainfo,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset',
        data_root=_base_.digits_root,
        data_prefix='crops/val',
        metainfo=_base_.digits_metainfo,
        pipeline=plain_pipeline,
    ),
)
test_dataloader = dict(
    val_dataloader, dataset=dict(val_dataloader['dataset'], data_prefix='crops/test')
)
val_evaluator = test_evaluator = dict(type='Accuracy', topk=(1,))

optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.004, weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', T_max=max_epochs, eta_min=0.001, by_epoch=True),
]
custom_hooks = [
    dict(
        type='SwitchRecipeHook',
        schedule=[
            dict(
                action_epoch=max_epochs - plain_epochs + 1,  # counts from 1
                train_pipeline=plain_pipeline,
                batch_augments=None,
            )
        ],
    ),
    dict(type='mmema.EMAHook', momentum=0.05, gamma=20, update_buffers=True),
    dict(type='mmema.EMARestartHook', follow='SwitchRecipeHook', gamma=10),
]
default_hooks = dict(
    logger=dict(interval=16),
    checkpoint=dict(interval=4, max_keep_ckpts=2, save_best='accuracy/top1'),
)
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=2)
val_cfg = dict(type='mmema.EMAValLoop')  # raw weights beside the averaged ones
test_cfg = dict()
randomness = dict(seed=0)
