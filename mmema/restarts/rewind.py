"""Where training goes on from after a restart; the way back to the best checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mmengine.hooks import CheckpointHook
from mmengine.runner.checkpoint import _load_checkpoint

from ..checkpoints.resume import KEPT
from ..update.pairs import unwrapped

SOURCES = ('model', 'ema', 'best')


def saves_best(runner) -> bool:
    """Tell whether the run has a CheckpointHook that keeps a best checkpoint."""
    hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    return any(hook.save_best is not None for hook in hooks)


def keep_best(runner, moment: str) -> str | None:
    """Copy the best checkpoint so far to a name of its own; return it, or None without one.

    CheckpointHook deletes the best checkpoint when a better one comes, and writes files in place.
    A run that was killed and resumed from an older checkpoint can find the best one of that time
    deleted; then the copy that was made at the same moment before serves again.
    """
    work_dir = Path(runner.work_dir)
    kept = work_dir / f'{KEPT}{moment.replace(" ", "_")}.pth'
    best = _best_so_far(runner)
    if best is None:
        return None
    for file in (best, work_dir / best.name, kept):  # the folder may have been moved
        if file.is_file():
            break
    else:
        raise ValueError(
            f'the restart needs the best checkpoint {best}, but the file is gone. Put it back, or '
            "set source='model'."
        )
    checkpoint = _load_checkpoint(str(file), map_location='cpu')
    missing = [key for key in ('ema_state_dict', 'optimizer') if key not in checkpoint]
    if missing:
        runner.logger.warning(
            f'EMARestartHook: {file} has no {" and no ".join(missing)}: it was saved before this '
            'hook was in the run'
        )
        return None
    if file != kept:
        part = kept.with_suffix('.part')
        shutil.copyfile(file, part)
        os.replace(part, kept)
    return kept.name


def _best_so_far(runner) -> Path | None:
    """Return the file of the first metric of ``save_best`` that has one."""
    hook = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
    metrics = getattr(hook, 'key_indicators', None) or []
    for key in ('best_ckpt', *(f'best_ckpt_{metric}' for metric in metrics)):
        if runner.message_hub.runtime_info.get(key):
            return Path(runner.message_hub.get_info(key))
    return None


def kept_file(runner, name: str) -> Path:
    """Return where a kept copy is: in the work folder, or where the run was resumed from."""
    resumed_from = Path(str(runner._load_from or '')).parent
    for folder in (Path(runner.work_dir), resumed_from):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f'the run goes back to {name} at restarts, but {runner.work_dir} does not hold it. Copy it '
        'there from the folder of the run that was resumed.'
    )


def complete(runner, checkpoint: dict) -> None:
    """Add what CheckpointHook leaves out of its best checkpoint: a way back needs the optimizer.

    With the parameter schedulers, too, it is a file to resume from when a kill cut the last one
    short.
    """
    if 'optimizer' not in checkpoint:
        checkpoint['optimizer'] = runner.optim_wrapper.state_dict()
    if 'param_schedulers' not in checkpoint and runner.param_schedulers is not None:
        schedulers = runner.param_schedulers
        checkpoint['param_schedulers'] = (
            {name: [s.state_dict() for s in some] for name, some in schedulers.items()}
            if isinstance(schedulers, dict)
            else [s.state_dict() for s in schedulers]
        )


def go_back(runner, ema, file: Path) -> None:
    """Put back model, average, optimizer and AMP scaler; epoch, data order and LR go on."""
    checkpoint = _load_checkpoint(str(file), map_location='cpu')
    state = checkpoint['ema_state_dict']
    # MMEngine saves the averaged weights as `state_dict`, the raw ones in the place of the average.
    averaged = checkpoint['state_dict']
    raw = {key[7:]: tensor for key, tensor in state.items() if key.startswith('module.')}
    unwrapped(runner.model).load_state_dict(raw)
    ema.rewind({'steps': state['steps'], **{f'module.{k}': averaged[k] for k in raw}})
    _put_back_optimizer(runner.optim_wrapper, checkpoint['optimizer'])


def _put_back_optimizer(wrapper, state: dict) -> None:
    if not hasattr(wrapper, 'optimizer'):  # an OptimWrapperDict
        for name, inner in wrapper.items():
            _put_back_optimizer(inner, state[name])
        return
    # Learning rate and its like stay: schedulers work on what they find there.
    groups = wrapper.optimizer.state_dict()['param_groups']
    state = {**state, 'param_groups': groups}
    state.pop('base_param_settings', None)
    wrapper.load_state_dict(state)
