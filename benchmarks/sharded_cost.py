#!/usr/bin/env python3
"""Measure an averaged model on several ranks: DDP beside FSDP2, memory, update and messages.

    torchrun --nproc-per-node 2 benchmarks/sharded_cost.py YOLOv5-n YOLOv5-l

Memory is counted, not measured: the bytes of the tensors that a rank keeps, the largest over ranks.
The time of an update is the median of the slowest rank. The model trains on random pictures of 64
pixels with a made-up loss, and is sharded as in configs/sharded.
"""

import argparse
import time
from copy import deepcopy
from statistics import median

import torch
import torch.distributed as dist
from contenders import MOMENTUM
from model_shapes import CONFIGS, build
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import mmema
from mmema.update.sharded import followed

SHARD = ('0.stage1', '0.stage2', '0.stage3', '0.stage4', '1', '2')  # of backbone, neck and head


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('models', nargs='*', default=['YOLOv5-n'], help=', '.join(CONFIGS))
    parser.add_argument('--rounds', type=int, default=60, metavar='N')
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Built before there are ranks: MMYOLO's SyncBatchNorm needs GPUs.
    models = {name: build(name, 'cpu') for name in args.models}
    dist.init_process_group('gloo')
    rows = ['model', 'ranks', '', 'weights', '+ gradients, AdamW', 'average', 'update, ms']
    rows += ['collectives: an update', 'a swap', 'an iteration']
    say(rows)
    say(['---'] * len(rows))
    for name, model in models.items():
        for kind in (ddp, fsdp2):
            layers = nn.Sequential(model.backbone, model.neck, model.bbox_head)
            found = measure(kind(deepcopy(layers)), args.rounds)
            say([name, dist.get_world_size(), kind.__name__, *found])
    dist.destroy_process_group()


def ddp(model):
    return DistributedDataParallel(model)


def fsdp2(model):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh('cpu', (dist.get_world_size(),))
    for path in SHARD:
        fully_shard(model.get_submodule(path), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def measure(model, rounds):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    pictures = torch.randn(2, 3, 64, 64)

    def iteration():
        outs = model(pictures)
        flat = [one for group in outs for one in (group if isinstance(group, list) else [group])]
        sum(one.square().mean() for one in flat).backward()
        optimizer.step()

    iteration()
    ema = mmema.ExpMomentumEMA(getattr(model, 'module', model), MOMENTUM, 1e-3)
    ema.update_parameters(model)
    with Collectives() as of_iteration:
        iteration()
    gradients = size(p.grad for p in model.parameters())
    slots = size(v for state in optimizer.state.values() for v in state.values())
    optimizer.zero_grad()
    times = []
    for _ in range(rounds):
        dist.barrier()
        begin = time.perf_counter()
        ema.update_parameters(model)
        times.append(time.perf_counter() - begin)
    with Collectives() as of_update:
        ema.update_parameters(model)
    with Collectives() as of_swap, mmema.averaged_weights(model, ema):
        pass
    weights, average = (size(m.parameters()) for m in (followed(model), ema.module))
    counts = [mode.count for mode in (of_update, of_swap, of_iteration)]
    largest = torch.tensor([weights, gradients + slots, average, median(times) * 1e9])
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    *memory, seconds = largest.tolist()
    return [*(f'{each / 2**20:.2f} MiB' for each in memory), f'{seconds / 1e6:.2f}', *counts]


class Collectives(TorchDispatchMode):
    """Count of the messages to other ranks. torch's CommDebugMode forbids activations in place."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace in ('c10d', '_c10d_functional') and 'wait' not in str(
            function
        )
        return function(*args, **(kwargs or {}))


def size(tensors):
    """Return the bytes that this rank has of the tensors."""
    local = [getattr(tensor.detach(), '_local_tensor', tensor) for tensor in tensors]
    return float(sum(tensor.numel() * tensor.element_size() for tensor in local))


def say(cells):
    if dist.get_rank() == 0:
        print(f'| {" | ".join(map(str, cells))} |', flush=True)


if __name__ == '__main__':
    main()
