"""Return to the best checkpoint of a run, and the copies of it that restarts keep."""

from __future__ import annotations

import math
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Mapping

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseAveragedModel
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint

from ..checkpoints import folders
from ..checkpoints.probe import structure
from ..checkpoints.resume import KEPT, exchange_weights
from ..messages import RunError, warn
from ..run import MAIN, checkpoint_hooks, folders_of, traits_of
from ..update.pairs import unwrapped
from ..update.sharded import own_optimizer_state, own_state


def best_files(runner: Runner) -> list:
    """Return the best checkpoints so far, in the order of the metrics of ``save_best``.

    MMEngine notes them under another key where there is one metric than where there are several,
    and forgets neither when ``save_best`` changes on a resume. So the file's name has to tell.
    """
    known, files = runner.message_hub.runtime_info, []
    for hook in checkpoint_hooks(runner):
        for metric in getattr(hook, 'key_indicators', None) or []:
            own = getattr(hook, 'best_ckpt_path_dict', {}).get(metric)
            own = own or getattr(hook, 'best_ckpt_path', None)
            noted = (own, known.get(f'best_ckpt_{metric}'), known.get('best_ckpt'))
            files += [file for file in noted if file and is_best_of(file, metric, hook)][:1]
    return files


def is_best_of(file: str, metric: str, hook: CheckpointHook) -> bool:
    """Tell from its name whether a file is the best by a metric; CheckpointHook gave it."""
    number = re.sub(r'\\\{[^}]*\}', r'\\d+', re.escape(hook.filename_tmpl))
    metric = re.escape(metric.replace('/', '_'))
    name = rf'best_{metric}_({number}|(epoch|iter)_\d+\.pth)'
    return re.fullmatch(name, Path(file).name) is not None


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


def keep_best(runner: Runner) -> tuple:
    """Copy the best checkpoint so far to a name of its own, that of the current iteration.

    CheckpointHook deletes the best checkpoint when a better one comes, and writes files in place.
    After a resume from an older checkpoint the best one of that time can be gone; then the copy
    that was made at the same iteration before serves again.

    Returns the copy's name, None without a best checkpoint; and the copies which that one names.
    """
    best = next(iter(best_files(runner)), None)
    if best is None:
        return None, []
    work_dir = Path(runner.work_dir)
    kept = work_dir / f'{KEPT}iter_{runner.iter}.pth'
    # The folder may have been moved, or the run resumed into another one.
    folders = [Path(best).parent, *folders_of(runner)]
    places = [folder / name for name in (Path(best).name, kept.name) for folder in folders]
    traits_of(runner).finish_saving()
    file = next((file for file in places if file.exists()), None)
    if file is None:
        raise RunError(
            f'the restart needs the best checkpoint {best}, but the file is gone. Put it back, or '
            "set source='model'."
        )
    checkpoint = structure(file)
    missing = [key for key in ('ema_state_dict', 'optimizer') if key not in checkpoint]
    if missing:
        warn(
            f'EMARestartHook: {file} has no {" and no ".join(missing)}: it was saved before this '
            'hook was in the run, or it is damaged'
        )
        return None, []
    if file != kept:
        part = kept.with_suffix('.part')
        if file.is_dir():
            for stale in (part, kept):
                shutil.rmtree(stale, ignore_errors=True)
            shutil.copytree(file, part)
        else:
            shutil.copyfile(file, part)
        os.replace(part, kept)
    named = [name for state in checkpoint['ema_restart'] for name in kept_names(state)[-1:]]
    return kept.name, named


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
    oldest = math.inf
    for hook in checkpoint_hooks(runner):
        unit = len(runner.train_dataloader) if hook.by_epoch else 1
        left = getattr(hook, 'keep_ckpt_ids', None) or [0]  # a hook that deletes none has no list
        oldest = min(oldest, min(left) * unit)
    before = {name for progress in progresses for name in progress.kept}
    for progress in progresses:
        earlier = [name for name in progress.kept if _iteration_of(name) < oldest]
        dropped = set(earlier).difference(earlier[-1:], still_named)
        progress.kept = [name for name in progress.kept if name not in dropped]
    if is_main_process():
        for name in before.difference(*(progress.kept for progress in progresses)):
            kept = Path(runner.work_dir, name)
            if kept.is_dir():
                shutil.rmtree(kept)
            else:
                kept.unlink(missing_ok=True)


def _iteration_of(name: str) -> int:
    return int(Path(name).stem.rsplit('_', 1)[-1])


def go_back(runner: Runner, averages: Mapping[str, BaseAveragedModel], name: str) -> None:
    """Put back model, averages, optimizer and AMP scaler of a copy; time, data and LR go on.

    ``averages`` are the main one by its name, or the rungs of a ladder by theirs.
    """
    files = [folder / name for folder in folders_of(runner)]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise RunError(
            f'the run goes back to {name} at restarts, but {runner.work_dir} does not hold it. '
            'Copy it there from the folder of the run that was resumed.'
        )
    read = folders.read if file.is_dir() else partial(_load_checkpoint, map_location='cpu')
    checkpoint = read(str(file))
    exchange_weights(checkpoint)
    model, states = unwrapped(runner.model), {MAIN: checkpoint['ema_state_dict']}
    states.update({n: one['state_dict'] for n, one in checkpoint.get('ema_also', {}).items()})
    model.load_state_dict(own_state(checkpoint['state_dict'], model))
    for own, ema in averages.items():
        if own not in states:
            raise RunError(f'{file} has no average {own!r} to go back to')
        average = states[own]
        keys = [key for key in average if key.startswith('module.') or key in ('steps', 'record')]
        ema.rewind({key: average[key] for key in keys})
    _put_back_optimizer(runner.optim_wrapper, checkpoint['optimizer'])


def _put_back_optimizer(wrapper, state: dict) -> None:
    if not hasattr(wrapper, 'optimizer'):  # an OptimWrapperDict
        for name, inner in wrapper.items():
            _put_back_optimizer(inner, state[name])
        return
    # Learning rate and its like stay: schedulers work on the values that they find there.
    state = {**state, 'param_groups': wrapper.optimizer.state_dict()['param_groups']}
    state.pop('base_param_settings', None)
    wrapper.load_state_dict(own_optimizer_state(state, wrapper.optimizer))
