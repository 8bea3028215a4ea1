_base_ = [
    'mmyolo::rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py',
    '../_base_/digits.py',
    '../_base_/digits_run.py',
]

model = dict(
    backbone=dict(init_cfg=None),  # the stock one downloads weights
    bbox_head=dict(head_module=dict(num_classes=10)),
    train_cfg=dict(assigner=dict(num_classes=10)),
)

mosaic_pipeline = [
    *_base_.digits_load,
    dict(
        type='Mosaic',
        img_scale=_base_.digits_scale,
        use_cached=True,
        max_cached_images=20,
        random_pop=False,
        pad_val=114.0,
    ),
    dict(
        type='mmdet.RandomResize',
        scale=(2 * _base_.digits_scale[0], 2 * _base_.digits_scale[1]),
        ratio_range=(0.5, 2.0),
        resize_type='mmdet.Resize',
        keep_ratio=True,
    ),
    dict(type='mmdet.RandomCrop', crop_size=_base_.digits_scale),
    dict(type='mmdet.YOLOXHSVRandomAug'),
    dict(type='mmdet.Pad', size=_base_.digits_scale, pad_val=dict(img=(114, 114, 114))),
    dict(
        type='YOLOv5MixUp',
        use_cached=True,
        random_pop=False,
        max_cached_images=10,
        prob=0.5,
    ),
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

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-5, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0002,
        begin=_base_.digits_epochs // 2,
        end=_base_.digits_epochs,
        T_max=_base_.digits_epochs // 2,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
default_hooks = _base_.digits_hooks
custom_hooks = [
    _base_.digits_ema,
    _base_.digits_restart,
    dict(
        type='mmdet.PipelineSwitchHook',
        switch_epoch=_base_.digits_switch_epoch,
        switch_pipeline=_base_.digits_plain_pipeline,
    ),
]
train_cfg = _base_.digits_train_cfg
val_cfg = _base_.digits_val_cfg
randomness = _base_.digits_randomness
