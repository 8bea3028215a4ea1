# The run of yolov5_n_digits.py with nothing chosen: a ladder of averages, and no restart.
_base_ = './yolov5_n_digits.py'

custom_hooks = [
    dict(type='mmema.EMAHook', horizon='auto'),
    dict(type='mmema.EMAMonitorHook'),
    dict(
        type='mmdet.PipelineSwitchHook',
        switch_epoch=_base_.digits_switch_epoch,
        switch_pipeline=_base_.digits_plain_pipeline,
    ),
]
