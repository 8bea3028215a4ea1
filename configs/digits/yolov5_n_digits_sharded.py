# YOLOv5-n on the digits, sharded over two ranks with half of the batch each, on GPUs or a CPU:
# torchrun --nproc-per-node 2 tools/train.py configs/digits/yolov5_n_digits_sharded.py
_base_ = './yolov5_n_digits.py'

runner_type = 'FlexibleRunner'
strategy = dict(type='mmema.FullyShardStrategy', shard=['backbone.stage?', 'neck', 'bbox_head'])

model = dict(use_syncbn=False)  # torch's SyncBatchNorm needs GPUs
train_dataloader = dict(batch_size=8, num_workers=1)  # of each rank
custom_hooks = [
    {**_base_.digits_ema, 'type': 'mmema.EMAHook'},
    _base_.digits_restart,
    dict(type='mmema.EMAMonitorHook', check_ranks=100),
    _base_.custom_hooks[-1],
]
