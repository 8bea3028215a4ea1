# RTMDet-s whose average restarts with its second stage, the last 20 epochs without mosaic.
_base_ = [
    'mmyolo::rtmdet/rtmdet_s_syncbn_fast_8xb32-300e_coco.py',
    '../_base_/restart.py',
]

train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
custom_hooks = [
    {**_base_.restartable_ema, 'momentum': 0.0002},
    dict(
        type='mmdet.PipelineSwitchHook',
        switch_epoch=_base_.max_epochs - _base_.num_epochs_stage2,
        switch_pipeline=_base_.train_pipeline_stage2,
    ),
    _base_.restart_at_switch,
]
