_base_ = './rtmdet_tiny_ablation.py'

ablation = dict(schedule='to a fifth')
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], eta_min_ratio=0.2),
]
