"""Where training goes on from after a restart; the way back to the best checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mmengine.hooks import CheckpointHook
from mmengine.model import is_model_wrapper
from mmengine.runner.checkpoint import _load_checkpoint

SOURCES = ('model', 'ema', 'best')


def model_of(runner):
    """Return the run's model without its wrapper."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


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
    kept = Path(runner.work_dir) / f'best_before_restart_at_{moment.replace(" ", "_")}.pth'
    best = next(
        (
            Path(path)
            for key, path in runner.message_hub.runtime_info.items()
            if (key == 'best_ckpt' or key.startswith('best_ckpt_')) and path
        ),
        None,
    )
    if best is None:
        return None
    if best.is_file():
        part = kept.with_suffix('.part')
        shutil.copyfile(best, part)
        os.replace(part, kept)
    elif not kept.is_file():
        raise ValueError(
            f'the restart needs the best checkpoint {best}, but the file is gone. Put it back, or '
            "set source='model'."
        )
    return kept.name


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
    model_of(runner).load_state_dict(raw)
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
