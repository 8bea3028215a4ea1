"""Refusals of runs that a strategy of mmema cannot train."""

from __future__ import annotations

import inspect
import sys

import torch
from mmengine._strategy import BaseStrategy
from mmengine.dist import is_distributed
from mmengine.hooks import EMAHook as StockEMAHook
from mmengine.runner import FlexibleRunner

from ..messages import RunError


def refuse_stock_hook(strategy) -> None:
    """Raise RunError if the FlexibleRunner that calls a strategy of ours has MMEngine's EMAHook.

    That hook swaps, saves and loads in ways that neither FSDP2 nor DeepSpeed allows, and its first
    error comes from deep inside of torch. A strategy is not told of hooks.
    """
    frame = sys._getframe(1)
    while frame is not None:
        runner, frame = frame.f_locals.get('self'), frame.f_back
        for hook in runner.hooks if isinstance(runner, FlexibleRunner) else ():
            if isinstance(hook, StockEMAHook) and not hasattr(hook, 'also'):
                raise RunError(
                    f"{type(strategy).__name__} needs mmema.EMAHook, got MMEngine's "
                    f"{type(hook).__name__}. Set type='mmema.EMAHook' in custom_hooks; its other "
                    'arguments stay.'
                )


def refuse_no_launcher(strategy: BaseStrategy) -> None:
    """Raise RunError if no launcher has started this process."""
    if not is_distributed():
        raise RunError(
            f'{type(strategy).__name__} needs a launcher, got none: '
            'torchrun --nproc-per-node 2 tools/train.py CONFIG --launcher pytorch'
        )


def refuse_old_torch() -> None:
    """Raise RunError if torch has no FSDP2."""
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
        from torch.distributed.tensor import distribute_tensor

        found = 'src_data_rank' in inspect.signature(distribute_tensor).parameters
    except ImportError:
        found = False
    if not found:
        raise RunError(
            f'FullyShardStrategy needs the FSDP2 of torch 2.7, got torch {torch.__version__}. '
            "Train with strategy=dict(type='DDPStrategy')."
        )
