"""Return to the best checkpoint of a run, and the copies of it that restarts keep."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseAveragedModel
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint

from ..checkpoints.resume import KEPT
from ..messages import RunError, warn
from ..update.pairs import unwrapped


def saves_best(runner: Runner) -> bool:
    """Tell whether the run has a CheckpointHook that saves a best checkpoint."""
    return any(hook.save_best is not None for hook in _checkpoint_hooks(runner))


def _checkpoint_hooks(runner: Runner) -> list:
    return [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]


def best_files(runner: Runner) -> list:
    """Return the best checkpoints so far, in the order of the metrics of ``save_best``."""
    hook = next(iter(_checkpoint_hooks(runner)), None)
    metrics = getattr(hook, 'key_indicators', None) or []
    keys = ('best_ckpt', *(f'best_ckpt_{metric}' for metric in metrics))
    known = runner.message_hub.runtime_info
    return [known[key] for key in keys if known.get(key)]


def complete(runner: Runner, checkpoint: dict) -> None:
    """Add the optimizer, which a rewind needs and CheckpointHook leaves out of its best.

    With the schedulers, too, a run can be resumed from it where a kill has cut the last file short.
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


# --- kept copies --------------------------------------------------------------------------------


def keep_best(runner: Runner) -> tuple:
    """Copy the best checkpoint so far to a name of its own, that of the current iteration.

    CheckpointHook deletes the best checkpoint when a better one comes, and writes files in place.
    After a resume from an older checkpoint the best one of that time can be gone; then the copy
    that was made at the same iteration before serves again.

    Returns:
        The name of the copy, None without a best checkpoint; and the copies that a run resumed from
        the best checkpoint would go back to.

    Raises:
        RunError: If the best checkpoint is gone.
    """
    best = next(iter(best_files(runner)), None)
    if best is None:
        return None, []
    work_dir = Path(runner.work_dir)
    kept = work_dir / f'{KEPT}iter_{runner.iter}.pth'
    places = (Path(best), work_dir / Path(best).name, kept)  # the folder may have been moved
    file = next((file for file in places if file.is_file()), None)
    if file is None:
        raise RunError(
            f'the restart needs the best checkpoint {best}, but the file is gone. Put it back, or '
            "set source='model'."
        )
    checkpoint = _load_checkpoint(str(file), map_location='cpu')
    missing = [key for key in ('ema_state_dict', 'optimizer') if key not in checkpoint]
    if missing:
        warn(
            f'EMARestartHook: {file} has no {" and no ".join(missing)}: it was saved before this '
            'hook was in the run'
        )
        return None, []
    if file != kept:
        part = kept.with_suffix('.part')
        shutil.copyfile(file, part)
        os.replace(part, kept)
    return kept.name, [
        name for state in checkpoint['ema_restart'] for name in kept_names(state)[-1:]
    ]


def kept_names(state: dict) -> list:
    """Return the copies that the state of a rule names; mmema 0.1.0 named one, or None."""
    kept = state['kept'] or []
    return [kept] if isinstance(kept, str) else list(kept)


def drop_kept(runner: Runner, progresses: list, still_named: list) -> None:
    """Cut the lists of kept copies, and delete the copies that no resume can need any more.

    A run that is resumed from the oldest checkpoint left does all restarts after it again, and goes
    back to the last copy before it. Checkpoints after it name the same copies, or later ones; only
    the best checkpoint can be older, and names ``still_named``.
    """
    oldest = _oldest_checkpoint(runner)
    before = {name for progress in progresses for name in progress.kept}
    for progress in progresses:
        if oldest is None:  # a resume can need every copy; a state needs to name the last alone
            progress.kept = progress.kept[-1:]
            continue
        needed = [name for name in progress.kept if _iteration_of(name) < oldest][-1:] + still_named
        progress.kept = [n for n in progress.kept if n in needed or _iteration_of(n) >= oldest]
    after = {name for progress in progresses for name in progress.kept}
    if oldest is not None and is_main_process():
        for name in before - after:
            (Path(runner.work_dir) / name).unlink(missing_ok=True)


def _iteration_of(name: str) -> int:
    return int(Path(name).stem.rsplit('_', 1)[-1])


def _oldest_checkpoint(runner: Runner) -> int | None:
    """Return the iteration of the oldest checkpoint that is left, None where none is deleted."""
    iterations = []
    for hook in _checkpoint_hooks(runner):
        if hook.max_keep_ckpts <= 0:
            return None
        unit = len(runner.train_dataloader) if hook.by_epoch else 1
        iterations += [number * unit for number in hook.keep_ckpt_ids]
    return min(iterations, default=0)


def kept_file(runner: Runner, name: str) -> Path:
    """Return the place of a copy: the work folder, or the one that the run was resumed from.

    Raises:
        RunError: If it is in neither.
    """
    resumed_from = Path(str(runner._load_from or '')).parent
    for folder in (Path(runner.work_dir), resumed_from):
        if (folder / name).is_file():
            return folder / name
    raise RunError(
        f'the run goes back to {name} at restarts, but {runner.work_dir} does not hold it. Copy it '
        'there from the folder of the run that was resumed.'
    )


# --- the rewind ---------------------------------------------------------------------------------


def go_back(runner: Runner, ema: BaseAveragedModel, file: Path) -> None:
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
    # Learning rate and its like stay: schedulers work on the values that they find there.
    groups = wrapper.optimizer.state_dict()['param_groups']
    state = {**state, 'param_groups': groups}
    state.pop('base_param_settings', None)
    wrapper.load_state_dict(state)
