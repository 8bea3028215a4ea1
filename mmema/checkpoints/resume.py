"""Choice, checks and weights of the checkpoint that a run is resumed from."""

from __future__ import annotations

from pathlib import Path

from mmengine.model import BaseAveragedModel

from ..averaged import EXTRA_STATE, state_keys
from ..messages import RunError, listed, warn
from ..update.pairs import canonical_name
from .probe import checkpoint_files, is_whole, top_level_keys

# Prefix of the copies of best checkpoints that are kept for restarts.
KEPT = 'best_before_restart_at_'


def checkpoint_to_resume(work_dir: str | Path) -> str | None:
    """Return the checkpoint that a run can be resumed from; None if there is none.

    That is the one that MMEngine's ``last_checkpoint`` names, unless it is gone or cut short: then
    the newest whole one that has an optimizer, and the log says so.

    Raises:
        RunError: If there was a checkpoint, and none is left that is whole and has an optimizer.
    """
    work_dir = Path(work_dir)
    note = work_dir / 'last_checkpoint'
    if not note.exists():
        return None  # not even the first checkpoint was finished
    name = note.read_text().strip() or '-'
    if '://' in name:
        return name  # on a storage that only MMEngine's backends reach
    named = Path(name)
    for file in (named, work_dir / named.name):  # the folder may have been moved
        if file.is_dir() or is_whole(file):  # MMEngine's strategies write folders
            return str(file)
    state = 'cut short' if named.is_file() else 'gone'
    files = {file for folder in (work_dir, named.parent) for file in checkpoint_files(folder)}
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        kept = file.name.startswith(KEPT)  # for a restart; newer than its content
        if not kept and is_whole(file) and 'optimizer' in top_level_keys(file):
            warn(f'{name} is {state}, so the run is resumed from {file}.')
            return str(file)
    raise RunError(
        f'no checkpoint in {work_dir} can be resumed from: {named.name} is {state}, and no other '
        'one is whole and has an optimizer. Start anew with resume=False, with load_from=FILE from '
        'the weights of another file.'
    )


def check_ema_state(checkpoint: dict, ema: BaseAveragedModel, file: str) -> None:
    """Check that a checkpoint holds the whole state of an average.

    Raises:
        RunError: If it does not, with the names of the missing or misshapen tensors.
    """
    how = (
        'Resume from a whole checkpoint, or start anew from its weights with '
        f'load_from={str(file)!r} and resume=False.'
    )
    if 'ema_state_dict' not in checkpoint:
        raise RunError(f'{file} has no ema_state_dict: the run that wrote it had no EMAHook. {how}')
    state = checkpoint['ema_state_dict']
    missing = [key for key in state_keys(ema) if key not in state]
    if missing:
        raise RunError(f'the EMA state in {file} lacks {listed(missing)}. {how}')
    # Buffers may change their shape, and extra state is anything.
    buffers = {name for name, _ in ema.module.named_buffers(remove_duplicate=False)}
    other = [
        key
        for key, tensor in ema.module.state_dict().items()
        if key not in buffers and not key.endswith(EXTRA_STATE)
        if state[f'module.{key}'].shape != tensor.shape
    ]
    if other:
        raise RunError(
            f'the EMA state in {file} has other shapes than the model for {listed(other)}. {how}'
        )


def share_extra_state(checkpoint: dict) -> None:
    """Give the average the extra state of the model's layers, which nothing has averaged."""
    model = {canonical_name(key): value for key, value in checkpoint['state_dict'].items()}
    average = checkpoint['ema_state_dict']
    for key in average:
        if key.endswith(EXTRA_STATE):
            average[key] = model[canonical_name(key[7:])]


def exchange_weights(checkpoint: dict) -> None:
    """Exchange the weights under ``state_dict`` and ``ema_state_dict``, in place."""
    model, average = checkpoint['state_dict'], checkpoint['ema_state_dict']
    keys = {canonical_name(key): key for key in model}
    names = {key: canonical_name(key[7:]) for key in average if key.startswith('module.')}
    missing = [name for name in names.values() if name not in keys]
    if missing:
        raise RunError(
            f'state_dict must hold the tensors of ema_state_dict, but lacks {listed(missing)}'
        )
    for key, name in names.items():
        model[keys[name]], average[key] = average[key], model[keys[name]]
