# Several averages in the run of yolov5_n_digits.py: the same training, five sets of weights.
_base_ = './yolov5_n_digits.py'

custom_hooks = [
    dict(
        type='mmema.EMAHook',
        momentum=0.001,  # a horizon of 1,000 updates, of 1,600 in all
        gamma=100,
        update_buffers=True,
        also=dict(
            short=dict(momentum=0.005),
            restarted=dict(restart=dict(follow='PipelineSwitchHook', gamma=50)),
            swa=dict(
                ema_type='mmema.RestartableUniformAverage',
                restart=dict(milestones=[_base_.digits_switch_epoch]),
            ),
        ),
    ),
    dict(type='mmema.EMAMonitorHook'),
    dict(
        type='mmdet.PipelineSwitchHook',
        switch_epoch=_base_.digits_switch_epoch,
        switch_pipeline=_base_.digits_plain_pipeline,
    ),
]
default_hooks = dict(
    checkpoint=dict(
        _delete_=True,
        type='CheckpointHook',
        interval=5,
        max_keep_ckpts=2,
        save_best=['coco/bbox_mAP', 'restarted/coco/bbox_mAP', 'swa/coco/bbox_mAP'],
        rule='greater',
    )
)
vis_backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
visualizer = dict(vis_backends=vis_backends)
