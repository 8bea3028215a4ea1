_base_ = './yolov5_n_ablation.py'

ablation = dict(schedule='to a fifth')
default_hooks = dict(param_scheduler=dict(lr_factor=0.2))
