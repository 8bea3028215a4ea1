_base_ = [
    'mmyolo::yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py',
    '../_base_/digits.py',
    '../_base_/digits_run.py',
]

# The boxes of the set are 7 to 56 pixels wide and 23 to 62 high; the mosaic halves some of them.
anchors = [
    [(9, 14), (13, 22), (18, 30)],
    [(23, 36), (26, 46), (36, 44)],
    [(34, 54), (46, 54), (54, 80)],
]

model = dict(
    bbox_head=dict(
        head_module=dict(num_classes=10),
        prior_generator=dict(base_sizes=anchors),
        # The stock rule, 0.5 * classes / 80, leaves 0.06 for 10 classes: in so short a run the
        # boxes are found, but the digits in them are not told apart.
        loss_cls=dict(loss_weight=1.0),
        # Twice the stock weight: the digits are soon found, but stride 8 is coarse for them.
        loss_bbox=dict(loss_weight=0.1),
    )
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
    dict(type='mmema.EMAMonitorHook'),
    dict(
        type='mmdet.PipelineSwitchHook',
        switch_epoch=_base_.digits_switch_epoch,
        switch_pipeline=_base_.digits_plain_pipeline,
    ),
]
train_cfg = _base_.digits_train_cfg
val_cfg = _base_.digits_val_cfg
randomness = _base_.digits_randomness
