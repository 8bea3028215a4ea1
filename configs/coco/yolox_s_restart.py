# YOLOX-s whose average restarts when the augmentation ends, with the learning rate of Megvii's
# YOLOX: the cosine of the stock config is five epochs too long and does not end at its minimum.
_base_ = [
    'mmyolo::yolox/yolox_s_fast_8xb8-300e_coco.py',
    '../_base_/restart.py',
]

train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
param_scheduler = [
    dict(type='mmdet.QuadraticWarmupLR', by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min=_base_.base_lr * 0.05,
        begin=5,
        T_max=_base_.max_epochs - _base_.num_last_epochs - 5,
        end=_base_.max_epochs - _base_.num_last_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type='ConstantLR',
        factor=1,
        begin=_base_.max_epochs - _base_.num_last_epochs,
        end=_base_.max_epochs,
        by_epoch=True,
    ),
]
custom_hooks = [
    dict(
        type='YOLOXModeSwitchHook',
        num_last_epochs=_base_.num_last_epochs,
        new_train_pipeline=_base_.train_pipeline_stage2,
        priority=48,
    ),
    dict(type='mmdet.SyncNormHook', priority=48),
    _base_.restartable_ema,
    {**_base_.restart_at_switch, 'follow': 'YOLOXModeSwitchHook'},
]
