"""Batch size of a run: that of one update, and the one that its settings were chosen for."""

from __future__ import annotations

from mmengine.dist import get_world_size
from mmengine.runner import Runner

from ..messages import RunError
from .facts import RunFacts


def auto_scale_base(runner: Runner) -> int | None:
    """Return the batch size of ``auto_scale_lr``, if that is enabled."""
    strategy = getattr(runner, 'strategy', None)  # of FlexibleRunner
    return base_of(
        getattr(runner, 'auto_scale_lr', None) or getattr(strategy, '_auto_scale_lr', None)
    )


def base_of(scale_lr: dict | None) -> int | None:
    """Return the batch size of the settings of ``auto_scale_lr``, if that is enabled."""
    return scale_lr['base_batch_size'] if scale_lr and scale_lr.get('enable') else None


def loader_batch(loader) -> int | None:
    """Return the batch size of a dataloader on one rank; None if its sampler does not tell."""
    return loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None)


def batch_of_update(runner: Runner, facts: RunFacts) -> int:
    """Return the batch size of an update: all ranks, and accumulated iterations."""
    loader = runner.train_dataloader
    batch = loader_batch(loader)
    if batch is None:
        raise RunError(
            'base_batch_size needs the batch size of the run, but its batch_sampler, a '
            f'{type(loader.batch_sampler).__name__}, does not tell it. Leave base_batch_size out, '
            'and give momentum and gamma for the batch size that you use.'
        )
    return batch * get_world_size() * facts.accumulation
