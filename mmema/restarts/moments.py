"""Moments of a run: ``'epoch 8'`` is before the epoch with index 8, ``'iter 500'`` likewise."""

from __future__ import annotations

from mmengine.runner import IterBasedTrainLoop

from ..arguments import check_momentum, count
from ..run import last_of, validation_follows

FOLLOWED = ('PipelineSwitchHook', 'YOLOXModeSwitchHook')


def checked_milestones(milestones) -> list[int]:
    if milestones is None:
        return []
    if not isinstance(milestones, (list, tuple)):
        raise TypeError(f'milestones must be a list of integers, got {milestones!r}')
    milestones = [count('a milestone', at) for at in milestones]
    if milestones != sorted(set(milestones)):
        raise ValueError(f'milestones must rise, got {milestones}')
    return milestones


def checked_momentum(momentum, milestones: list[int], alone: bool):
    """Return one value, or one for each milestone where those are the only moments."""
    each = isinstance(momentum, (list, tuple))
    if each and not (alone and len(momentum) == len(milestones)):
        raise ValueError(
            'a list of momentum must have one value for each milestone, and no other trigger but '
            f'on_plateau, got {len(momentum)} values for {len(milestones)} milestones'
        )
    for value in momentum if each else [momentum]:
        check_momentum(value)
    return momentum


def unit_of(moment: str) -> str:
    return moment.split()[0]


def at_of(moment: str) -> int:
    return int(moment.split()[1])


def now_of(runner) -> int:
    """Return the loop's own time: iterations or epochs that are over."""
    loop = runner.train_loop
    return loop.iter if isinstance(loop, IterBasedTrainLoop) else loop.epoch


def first_validation(runner) -> int:
    """Return after how many epochs or iterations the run validates first."""
    loop = runner.train_loop
    return next(now for now in range(1, last_of(loop) + 1) if validation_follows(loop, now))


def switch_epochs(runner, name: str, must: bool = True) -> list[int]:
    """Return the 0-based epochs before which the hooks of this name switch in this run."""
    hooks = [h for h in runner.hooks if any(c.__name__ == name for c in type(h).__mro__)]
    if must and not hooks:
        raise ValueError(
            f'follow={name!r} must name a hook of the run, got '
            f'{sorted({type(hook).__name__ for hook in runner.hooks})}'
        )
    epochs = []
    for hook in hooks:
        if hasattr(hook, 'switch_epoch'):
            epoch = hook.switch_epoch
        else:  # YOLOXModeSwitchHook compares epoch + 1, so it switches one epoch earlier
            epoch = runner.max_epochs - hook.num_last_epochs - 1
        # From that epoch on, or, as MMYOLO's YOLOXModeSwitchHook, in that one or never.
        if epoch >= 0 or hasattr(hook, '_has_switched'):
            epochs.append(max(epoch, 0))
    return epochs
