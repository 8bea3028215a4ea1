_base_ = [
    'mmyolo::yolox/yolox_nano_fast_8xb8-300e_coco.py',
    '../_base_/digits.py',
    '../_base_/digits_run.py',
]

model = dict(
    data_preprocessor=dict(
        batch_augments=[
            dict(
                type='YOLOXBatchSyncRandomResize',
                random_size_range=(96, 160),
                size_divisor=32,
                interval=10,
            )
        ]
    ),
    bbox_head=dict(head_module=dict(num_classes=10)),
)

mosaic_pipeline = [
    *_base_.digits_load,
    dict(
        type='Mosaic',
        img_scale=_base_.digits_scale,
        pad_val=114.0,
        pre_transform=_base_.digits_load,
    ),
    dict(
        type='mmdet.RandomAffine',
        scaling_ratio_range=(0.5, 1.5),
        border=(-_base_.digits_scale[0] // 2, -_base_.digits_scale[1] // 2),
    ),
    dict(type='mmdet.YOLOXHSVRandomAug'),
    dict(type='mmdet.FilterAnnotations', min_gt_bbox_wh=(1, 1), keep_empty=False),
    _base_.digits_pack,
]

train_dataloader = dict(
    **_base_.digits_train_loader,
    dataset=dict(**_base_.digits_train_set, pipeline=mosaic_pipeline),
)
val_dataloader = _base_.digits_val_dataloader
test_dataloader = _base_.digits_test_dataloader
val_evaluator = _base_.digits_evaluator
test_evaluator = _base_.digits_test_evaluator

optim_wrapper = dict(optimizer=_base_.digits_adamw)
param_scheduler = [
    dict(type='mmdet.QuadraticWarmupLR', by_epoch=True, begin=0, end=3, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0002,
        begin=3,
        end=_base_.digits_switch_epoch,
        T_max=_base_.digits_switch_epoch - 3,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
default_hooks = _base_.digits_hooks
custom_hooks = [
    dict(
        type='YOLOXModeSwitchHook',  # switches one epoch earlier than its argument says
        num_last_epochs=_base_.digits_plain_epochs,
        new_train_pipeline=_base_.digits_plain_pipeline,
        priority=48,
    ),
    dict(type='mmdet.SyncNormHook', priority=48),
    _base_.digits_ema,
    {**_base_.digits_restart, 'follow': 'YOLOXModeSwitchHook'},
]
train_cfg = _base_.digits_train_cfg
val_cfg = _base_.digits_val_cfg
auto_scale_lr = dict(base_batch_size=16)
randomness = _base_.digits_randomness
