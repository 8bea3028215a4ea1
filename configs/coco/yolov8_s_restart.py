# YOLOv8-s whose average restarts when the mosaic ends, 10 epochs before the end.
_base_ = [
    'mmyolo::yolov8/yolov8_s_syncbn_fast_8xb16-500e_coco.py',
    '../_base_/restart.py',
]

train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
custom_hooks = [
    _base_.restartable_ema,
    dict(
        type='mmdet.PipelineSwitchHook',
        switch_epoch=_base_.max_epochs - _base_.close_mosaic_epochs,
        switch_pipeline=_base_.train_pipeline_stage2,
    ),
    _base_.restart_at_switch,
]
