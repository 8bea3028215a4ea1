# The averages that ride along in a run of the ablation (docs/evidence.md), and the run's length.

digits_ablation_epochs = 30
digits_ablation_plain_epochs = 10  # the last ones, without mosaic: 320 updates

# The number in a name is the share, in per cent, of the weights from before the switch that the
# average holds at the end of the run if it does not restart: (1 - momentum) ** 320.
digits_ablation_momentum = dict(_0=0.0214, _4=0.01, _20=0.00502, _40=0.00286, _60=0.0016)
# Warmed up long before the switch: exp(-640 / 50) is 3e-6.
digits_ablation_gamma = 50

# Fitted to the stage: the warm-up takes about gamma ln(1 / momentum) = 160 updates, half of it.
digits_ablation_hard_gamma = dict(_0=42, _4=35, _20=30, _40=27, _60=25)
# Half of what an average without a restart keeps is kept: exp(-gamma exp(-steps / gamma)) is 1/2.
digits_ablation_soft_steps = dict(_4=137, _40=99)

digits_ablation_none = {
    f'none{share}': dict(momentum=momentum, gamma=digits_ablation_gamma)
    for share, momentum in digits_ablation_momentum.items()
}
digits_ablation_hard = {
    f'hard{share}': dict(
        digits_ablation_none[f'none{share}'],
        restart=dict(follow='PipelineSwitchHook', gamma=gamma),
    )
    for share, gamma in digits_ablation_hard_gamma.items()
}
digits_ablation_soft = {
    f'soft{share}': dict(
        digits_ablation_none[f'none{share}'],
        restart=dict(digits_ablation_hard[f'hard{share}']['restart'], steps=steps),
    )
    for share, steps in digits_ablation_soft_steps.items()
}
# What D-FINE meant: the counter goes on and the decay falls, in its code from 0.9999 to 0.9998.
digits_ablation_schedule = {
    f'schedule{share}': dict(
        digits_ablation_none[f'none{share}'],
        restart=dict(
            follow='PipelineSwitchHook', steps=None, momentum=2 * digits_ablation_momentum[share]
        ),
    )
    for share in ('_4', '_40')
}

# `ema`, the average of the run itself, has the stock momentum and gamma of its family.
digits_ablation_ema = dict(
    type='mmema.EMAHook',
    gamma=2000,
    update_buffers=True,
    also=dict(
        **digits_ablation_none,
        **digits_ablation_hard,
        **digits_ablation_soft,
        **digits_ablation_schedule,
        mean=dict(
            ema_type='mmema.RestartableUniformAverage',
            restart=dict(follow='PipelineSwitchHook'),
        ),
    ),
)
# The questions, named before the runs (docs/evidence.md), for `mmema ablate`.
digits_ablation_held = dict(_0='0.1', _4='4', _20='20', _40='40', _60='60')
ablation = dict(
    # Two more averages, made at the evaluation: BatchNorm statistics of others measured anew.
    recalibrate=dict(hard_4_bn='hard_4', hard_40_bn='hard_40'),
    primary=('hard_40', 'none_40'),
    contrasts=[
        ('hard_4', 'none_4'),
        ('range of hard', 'range of none'),
        ('soft_40', 'none_40'),
        ('soft_4', 'none_4'),
        ('schedule_40', 'none_40'),
        ('schedule_4', 'none_4'),
        ('hard_40_bn', 'hard_40'),
        ('hard_4_bn', 'hard_4'),
        ('none_40', 'raw'),
        ('none_4', 'raw'),
        ('hard_4', 'raw'),
        ('mean', 'raw'),
        ('ema', 'raw'),
    ],
    ranges={
        f'range of {kind}': {held: f'{kind}{share}' for share, held in digits_ablation_held.items()}
        for kind in ('hard', 'none')
    },
    over='horizon, as % held from before the switch',
)

digits_ablation_switch = dict(
    type='mmdet.PipelineSwitchHook',
    switch_epoch=digits_ablation_epochs - digits_ablation_plain_epochs,
)
digits_ablation_train_cfg = dict(max_epochs=digits_ablation_epochs)
# `mmema ablate` evaluates the checkpoints that are kept: of epochs 24, 27 and 30.
digits_ablation_hooks = dict(
    logger=dict(interval=32), checkpoint=dict(interval=3, max_keep_ckpts=3, save_best=None)
)
# Two runs side by side on two cores are faster without workers.
digits_ablation_loader = dict(num_workers=0, persistent_workers=False)
# The stock 300 boxes with a score above 0.001 take most of the time of an evaluation, and COCO's
# mAP looks at 100.
digits_ablation_test_cfg = dict(score_thr=0.01, nms_pre=1000, max_per_img=100)
