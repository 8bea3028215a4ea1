# MMDetection's RTMDet-x with a restart at its second stage, sharded over 8 GPUs by torch's FSDP2:
# torchrun --nproc-per-node 8 tools/train.py configs/sharded/rtmdet_x_coco.py
# On 2 machines with 8 each `replicas=2` keeps the gathering of weights inside of a machine.
_base_ = 'mmdet::rtmdet/rtmdet_x_8xb32-300e_coco.py'

runner_type = 'FlexibleRunner'
strategy = dict(type='mmema.FullyShardStrategy', shard=['backbone.stage?', 'neck', 'bbox_head'])

custom_hooks = [
    dict(type='mmema.EMAHook', momentum=0.0002, update_buffers=True, priority=49),
    _base_.custom_hooks[1],
    dict(type='mmema.EMARestartHook', follow='PipelineSwitchHook', momentum=0.0005, gamma=500),
    dict(type='mmema.EMAMonitorHook', check_ranks=1000),
]
