# YOLOX-s of yolox_s_restart.py with a ladder of averages instead: no horizon is chosen.
_base_ = './yolox_s_restart.py'

custom_hooks = [
    dict(
        type='YOLOXModeSwitchHook',
        num_last_epochs=_base_.num_last_epochs,
        new_train_pipeline=_base_.train_pipeline_stage2,
        priority=48,
    ),
    dict(type='mmdet.SyncNormHook', priority=48),
    dict(type='mmema.EMAHook', horizon='auto', priority=49),
]
