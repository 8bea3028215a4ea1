"""Questions to a Runner that several rooms ask."""

from __future__ import annotations

import bisect
import random
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable

import numpy as np
import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.hooks import EMAHook as StockEMAHook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from ..checkpoints.probe import is_whole
from ..checkpoints.resume import checkpoint_to_resume
from ..messages import RunError, warn
from .names import MAIN


def ema_hook_of(runner: Runner) -> StockEMAHook:
    """Return the run's EMAHook, the stock one or ours; there must be one."""
    return the_ema_hook(runner.hooks)


def the_ema_hook(hooks: Iterable[Hook]) -> StockEMAHook:
    """Return the EMAHook among hooks; raise RunError unless there is one."""
    found = [hook for hook in hooks if isinstance(hook, StockEMAHook)]
    if len(found) != 1:
        ours = (
            'For several averages give the others in also: '
            "dict(type='mmema.EMAHook', also=dict(short=dict(momentum=0.001)))"
        )
        stock = "dict(type='EMAHook', ema_type='mmema.RestartableExpMomentumEMA')"
        advice = ours if found else f'Add to custom_hooks: {stock}'
        raise RunError(f'the run must have one EMAHook, got {len(found)}. {advice}')
    return found[0]


def checkpoint_hooks(runner: Runner) -> list[CheckpointHook]:
    return [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]


def refuse_late_ema_hook(runner: Runner) -> None:
    """Raise RunError if a checkpoint would be saved before the update that belongs into it."""
    ema_hook = ema_hook_of(runner)
    for hook in runner.hooks[: runner.hooks.index(ema_hook)]:
        if isinstance(hook, CheckpointHook):
            raise RunError(
                f'EMAHook must come before CheckpointHook, which would save without the last '
                f'update, but {type(hook).__name__} ({hook.priority}) comes before it '
                f'({ema_hook.priority}). Give the hooks their own priorities: leave out priority=.'
            )


def averages_of(ema_hook: StockEMAHook) -> dict:
    """Return the averages of an EMAHook by name, the main one first."""
    return {MAIN: getattr(ema_hook, 'ema_model', None), **getattr(ema_hook, 'also', {})}


def choose_checkpoint(runner: Runner) -> None:
    """Choose the file that a run is resumed from, before MMEngine opens it.

    MMEngine takes the one that ``last_checkpoint`` names, even where it is gone or cut short. A
    second call finds the choice made and changes nothing.

    Raises:
        RunError: If the file that the config names is cut short, or the run's folder has no whole
            checkpoint left.
    """
    if not runner._resume or isinstance(runner._resume, str):  # FlexibleRunner has a name there
        return
    if runner._load_from is None:
        runner._load_from = checkpoint_to_resume(runner.work_dir)
    elif Path(runner._load_from).is_file() and not is_whole(runner._load_from):
        raise RunError(
            f'{runner._load_from} is cut short: the run was stopped while writing it. Leave '
            'load_from out to resume from the newest whole checkpoint.'
        )


def folders_of(runner: Runner) -> list[Path]:
    """Return the folder of a run, and that of the file which it was begun from."""
    file = runner._load_from or runner._resume  # FlexibleRunner may have a name in the second
    return [Path(runner.work_dir), *([Path(file).parent] if isinstance(file, str) else [])]


def what_loads(runner: Runner) -> tuple[str, bool]:
    """Return the file that is being loaded, and whether it is to resume the run.

    Hooks are called by ``Runner.resume`` and ``Runner.load_checkpoint`` in the same way, and
    ``runner._resume`` is the wish that the run began with, not the call that loads now.
    """
    calls, frame = {}, sys._getframe(1)
    while frame is not None:
        if frame.f_locals.get('self') is runner:
            calls.setdefault(frame.f_code.co_name, frame.f_locals)
        frame = frame.f_back
    call = calls.get('resume', calls.get('load_checkpoint', {}))
    resumes = 'resume' in calls or 'load_checkpoint' not in calls and bool(runner._resume)
    return str(call.get('filename', 'the checkpoint')), resumes


def tell_what_is_lost(runner: Runner, checkpoint: dict, file: str) -> None:
    """Warn of a resume from a file without optimizer or schedules: MMEngine says nothing."""
    wanted = ['optimizer', *(['param_schedulers'] if runner.param_schedulers else [])]
    lost = [key for key in wanted if key not in checkpoint]
    if lost and not hasattr(runner, 'strategy'):  # FlexibleRunner's fail by themselves
        warn(
            f'{file} has no {" and no ".join(lost)}: the run goes on with fresh ones. A best '
            'checkpoint has none; resume from one such as epoch_1.pth or iter_1000.pth, or begin '
            'a new run with load_from alone.'
        )


def validation_follows(loop, now: int) -> bool:
    """Tell whether MMEngine's ``loop`` validates after its epoch or iteration ``now``, from 1."""
    interval = loop.dynamic_intervals[bisect.bisect(loop.dynamic_milestones, now + 1) - 1]
    return now >= loop.val_begin and (now % interval == 0 or now == last_of(loop))


def validations_of(loop) -> int:
    """Return how many validations a loop makes before its last epoch or iteration."""
    return sum(validation_follows(loop, now) for now in range(1, last_of(loop)))


def make_up_validation(runner: Runner, validated: Iterable[int | None], who: str) -> None:
    """Make the validation that a resumed checkpoint was saved before; MMEngine would leave it out.

    Args:
        runner: The run that goes on.
        validated: The times of the last validations that were seen; one of now needs no other.
        who: The hook that asks, for the log.
    """
    now = now_of(runner)
    missed = runner.val_loop is not None and any(at != now for at in validated)
    if missed and validation_follows(runner.train_loop, now):
        runner.logger.info(f'{who}: the validation before the resume comes first')
        runner.val_loop.run()


def now_of(runner: Runner) -> int:
    """Return the number of epochs, or iterations, that are over: the time of the run's loop."""
    loop = runner.train_loop
    return loop.iter if isinstance(loop, IterBasedTrainLoop) else loop.epoch


def last_of(loop) -> int:
    """Return the number of epochs, or iterations, of a loop."""
    return loop.max_epochs if isinstance(loop, EpochBasedTrainLoop) else loop.max_iters


@contextmanager
def kept_rng():
    """Give back the state of every random generator that training draws from."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
