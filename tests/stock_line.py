"""Train a stock model on the digits: ``stock_line.py LEAF DATA``, on each of two ranks.

Under DDP, sharded, and sharded in bf16; into ``ddp``, ``sharded`` and ``bf16`` of the folder.
YOLOv8 cannot compute in bf16: its head multiplies by a float32 buffer.
"""

import sys
from pathlib import Path

import forks
import torch
from mmengine.registry import RUNNERS
from shard_line import DDP
from test_digits_configs import short_run

SHARDED = dict(type='mmema.FullyShardStrategy', shard=['backbone.stage?', 'neck', 'bbox_head'])
PRECISION = dict(param_dtype='bfloat16', reduce_dtype='float32', output_dtype='float32')
BF16 = {**SHARDED, 'mixed_precision': PRECISION}


def main(leaf, data):
    torch.set_num_threads(1)
    forks.join_ranks()
    strategies = {'ddp': DDP, 'sharded': SHARDED, 'bf16': BF16}
    if leaf.startswith('yolov8'):
        del strategies['bf16']
    for name, strategy in strategies.items():
        config = short_run(leaf, data, Path.cwd() / name)
        config.model.use_syncbn = False  # torch's SyncBatchNorm needs GPUs
        config.optim_wrapper.pop('clip_grad', None)  # its norm is summed in another order
        config.train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
        for hook in config.custom_hooks:
            if hook.type == 'EMAHook':
                hook.type = 'mmema.EMAHook'
        config.update(runner_type='FlexibleRunner', strategy=strategy, launcher='pytorch')
        RUNNERS.build(config).train()
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
