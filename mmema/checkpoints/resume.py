"""What a run can be resumed from: whole files with a whole EMA state."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from mmengine.model import BaseAveragedModel

from ..averaged import state_keys
from ..messages import listed, warn

# What the copies of best checkpoints are called that are kept for restarts.
KEPT = 'best_before_restart_at_'

_HOW_TO_GO_ON = (
    'Resume from a whole checkpoint, or start anew from its weights: --cfg-options '
    'load_from={file} resume=False'
)


def is_whole(file: str | Path) -> bool:
    """Tell whether a checkpoint was written to its end.

    torch writes the table of contents of its zip file last, and MMEngine writes the file in place:
    a process killed meanwhile leaves a file without one.
    """
    return zipfile.is_zipfile(file)


def checkpoint_to_resume(work_dir: str | Path) -> str | None:
    """Return the checkpoint that a run can be resumed from; None if there is none.

    That is the one that MMEngine's ``last_checkpoint`` names, unless the file is gone or cut short:
    then the newest other one that has an optimizer, and the log says so.

    Raises:
        ValueError: If there was a checkpoint, and none is left that is whole and has an optimizer.
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
        if file.is_file() and is_whole(file):
            return str(file)
    state = 'cut short' if named.is_file() else 'gone'
    files = {file for folder in (work_dir, named.parent) for file in folder.glob('*.pth')}
    # A copy that was kept for a restart is newer than what is in it.
    files = [file for file in files if not file.name.startswith(KEPT)]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        if is_whole(file) and _has_optimizer(file):
            warn(f'{name} is {state}, so the run is resumed from {file}.')
            return str(file)
    raise ValueError(
        f'no checkpoint in {work_dir} can be resumed from: {named.name} is {state}, and no other '
        'one is whole and has an optimizer. Start anew without resuming, or from the weights of '
        'another file with --cfg-options load_from=FILE'
    )


def _has_optimizer(file: Path) -> bool:
    try:
        return 'optimizer' in torch.load(file, map_location='cpu')
    except Exception:  # whatever lies in that folder: it is not ours
        return False


def check_ema_state(checkpoint: dict, ema: BaseAveragedModel, file: str) -> None:
    """Raise ValueError if a checkpoint does not hold all of an average, naming what is missing."""
    how = _HOW_TO_GO_ON.format(file=file)
    if 'ema_state_dict' not in checkpoint:
        raise ValueError(
            f'{file} has no ema_state_dict: the run that wrote it had no EMAHook. {how}'
        )
    state = checkpoint['ema_state_dict']
    missing = [key for key in state_keys(ema) if key not in state]
    if missing:
        raise ValueError(f'the EMA state in {file} lacks {listed(missing)}. {how}')
    own = ema.module.state_dict()
    other = [key for key, tensor in own.items() if state[f'module.{key}'].shape != tensor.shape]
    if other:
        raise ValueError(
            f'the EMA state in {file} has other shapes than the model for {listed(other)}. {how}'
        )
