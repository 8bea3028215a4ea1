_base_ = [
    'mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py',
    '../_base_/digits.py',
    '../_base_/digits_run.py',
]

model = dict(
    bbox_head=dict(head_module=dict(num_classes=10)),
    train_cfg=dict(assigner=dict(num_classes=10)),
)

train_dataloader = dict(
    **_base_.digits_train_loader,
    dataset=dict(**_base_.digits_train_set, pipeline=_base_.digits_mosaic_pipeline),
)
val_dataloader = _base_.digits_val_dataloader
test_dataloader = _base_.digits_test_dataloader
val_evaluator = _base_.digits_evaluator
test_evaluator = _base_.digits_test_evaluator

optim_wrapper = dict(optimizer=_base_.digits_adamw)
default_hooks = dict(**_base_.digits_hooks, param_scheduler=_base_.digits_yolo_schedule)
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
