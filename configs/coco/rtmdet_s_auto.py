# RTMDet-s with a ladder of averages: no horizon is chosen.
_base_ = 'mmyolo::rtmdet/rtmdet_s_syncbn_fast_8xb32-300e_coco.py'

train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
custom_hooks = [
    dict(type='mmema.EMAHook', horizon='auto', priority=49),
    dict(
        type='mmdet.PipelineSwitchHook',
        switch_epoch=_base_.max_epochs - _base_.num_epochs_stage2,
        switch_pipeline=_base_.train_pipeline_stage2,
    ),
]
