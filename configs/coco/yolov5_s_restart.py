# YOLOv5-s with what the stock config lacks, 15 last epochs without mosaic, and a restart there.
_base_ = [
    'mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py',
    '../_base_/restart.py',
]

close_mosaic_epochs = 15

train_pipeline_stage2 = [
    *_base_.pre_transform,
    dict(type='YOLOv5KeepRatioResize', scale=_base_.img_scale),
    dict(type='LetterResize', scale=_base_.img_scale, allow_scale_up=True, pad_val=dict(img=114.0)),
    dict(
        type='YOLOv5RandomAffine',
        max_rotate_degree=0.0,
        max_shear_degree=0.0,
        scaling_ratio_range=(1 - _base_.affine_scale, 1 + _base_.affine_scale),
        border_val=(114, 114, 114),
    ),
    dict(type='YOLOv5HSVRandomAug'),
    dict(type='mmdet.RandomFlip', prob=0.5),
    dict(
        type='mmdet.PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'flip', 'flip_direction'),
    ),
]

train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
custom_hooks = [
    _base_.restartable_ema,
    dict(
        type='mmdet.PipelineSwitchHook',
        switch_epoch=_base_.max_epochs - close_mosaic_epochs,
        switch_pipeline=train_pipeline_stage2,
    ),
    _base_.restart_at_switch,
]
