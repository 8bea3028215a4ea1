_base_ = ['./yolov5_n_digits.py', '../_base_/digits_ablation.py']

ablation = dict(family='YOLOv5-n', schedule='to 1 %')

model = dict(test_cfg=_base_.digits_ablation_test_cfg)
train_dataloader = _base_.digits_ablation_loader
default_hooks = dict(
    **_base_.digits_ablation_hooks,
    param_scheduler=dict(max_epochs=_base_.digits_ablation_epochs, lr_factor=0.01),
)
custom_hooks = [
    dict(**_base_.digits_ablation_ema, momentum=0.0001),
    dict(**_base_.digits_ablation_switch, switch_pipeline=_base_.digits_plain_pipeline),
]
train_cfg = _base_.digits_ablation_train_cfg
