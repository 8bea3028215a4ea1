# D-FINE's second stage as it was meant (in D-FINE itself the decay never changes: issue 331).
# At the switch: back to the best checkpoint so far, and on with the decay `ema_restart_decay`.
# After each validation that does not improve: 1e-4 less decay, and back to the same one again.

ema_restart_decay = 0.9999

dfine_refresh = dict(
    type='mmema.EMARestartHook',
    follow='PipelineSwitchHook',
    source='best',
    steps=None,
    momentum=round(1 - ema_restart_decay, 10),
    on_plateau=dict(
        metric='coco/bbox_mAP', patience=1, momentum_add=1e-4, max_momentum=0.1, after_restart=True
    ),
)
