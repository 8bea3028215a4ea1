# RTMDet-s with the second stage that D-FINE meant: from its best checkpoint, with refreshes.
_base_ = ['./rtmdet_s_restart.py', '../_base_/dfine_refresh.py']

custom_hooks = [
    _base_.restartable_ema,
    dict(
        type='mmdet.PipelineSwitchHook',
        switch_epoch=_base_.max_epochs - _base_.num_epochs_stage2,
        switch_pipeline=_base_.train_pipeline_stage2,
    ),
    _base_.dfine_refresh,
]
