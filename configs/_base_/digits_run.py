# How long a run on the digits set takes, what it keeps, and the average of its weights.

digits_epochs = 50
digits_plain_epochs = 20  # the last ones, without mosaic

digits_train_cfg = dict(max_epochs=digits_epochs, val_interval=5, dynamic_intervals=None)
digits_val_cfg = dict(type='mmema.EMAValLoop')  # raw weights beside the averaged ones
digits_hooks = dict(
    logger=dict(interval=16),
    checkpoint=dict(interval=5, save_best='coco/bbox_mAP', max_keep_ckpts=2),
)

# 1,600 iterations in all. The stock momentum (1e-4, a horizon of 10,000 iterations) and gamma
# (2000) are for runs a hundred times as long. Here the average remembers about 1 / 0.005 = 200
# iterations (6 epochs), and its warm-up is over after gamma ln(1 / momentum) = 530 iterations.
digits_ema = dict(
    type='EMAHook',
    ema_type='mmema.RestartableExpMomentumEMA',
    momentum=0.005,
    gamma=100,
    update_buffers=True,
    priority=49,
)

# The last 20 epochs have 640 iterations; with this gamma the warm-up takes 265 of them.
digits_restart = dict(type='mmema.EMARestartHook', follow='PipelineSwitchHook', gamma=50)

# In place of the stock SGD of YOLOv5, YOLOv8 and YOLOX, whose warm-up alone is 1,000 iterations.
digits_adamw = dict(_delete_=True, type='AdamW', lr=0.004, weight_decay=0.05)

# YOLOv5ParamSchedulerHook, of YOLOv5 and YOLOv8.
digits_yolo_schedule = dict(
    max_epochs=digits_epochs,
    warmup_mim_iter=100,
    warmup_bias_lr=0.0,  # the stock 0.1 is made for SGD: AdamW moves a bias by that much each time
)
# Milestone E is 'before the training epoch with 0-based index E'.
digits_switch_epoch = digits_epochs - digits_plain_epochs
digits_randomness = dict(seed=0)
