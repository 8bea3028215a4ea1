# The average of the recipes in configs/coco, and its restart where a pipeline switches.

restartable_ema = dict(
    type='EMAHook',
    ema_type='mmema.RestartableExpMomentumEMA',
    momentum=0.0001,
    update_buffers=True,
    priority=49,
)

# The last stages have 10 to 20 epochs, 9,000 updates or more. This horizon of 2,000 updates and
# this warm-up, over after gamma ln(1 / momentum) = 3,800, fit into them; the stock values do not.
restart_at_switch = dict(
    type='mmema.EMARestartHook', follow='PipelineSwitchHook', momentum=0.0005, gamma=500
)
