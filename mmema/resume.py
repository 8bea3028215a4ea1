"""What a run can be resumed from: whole files with a whole EMA state."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from mmengine.model import BaseAveragedModel

from .arguments import listed
from .averaged import MomentumAveragedModel

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


def checkpoint_to_resume(work_dir: str | Path) -> Path | None:
    """Return the furthest checkpoint of a run that it can be resumed from; None if there is none.

    That is the one that MMEngine's ``last_checkpoint`` names, unless the file is gone or cut short:
    then the furthest other one that has an optimizer.

    Raises:
        ValueError: If there was a checkpoint, and none is left that is whole and has an optimizer.
    """
    work_dir = Path(work_dir)
    note = work_dir / 'last_checkpoint'
    if not note.exists():
        return None  # not even the first checkpoint was finished
    named = Path(note.read_text().strip() or '-')
    moved = work_dir / named.name  # the folder, since the note was written; or seen from elsewhere
    named = moved if moved.is_file() else named
    if named.is_file() and is_whole(named):
        return named
    iterations = {file: _iterations_of(file) for file in work_dir.glob('*.pth') if is_whole(file)}
    furthest = max(iterations, key=iterations.get, default=None)
    if furthest is not None and iterations[furthest] >= 0:
        return furthest
    raise ValueError(
        f'no checkpoint in {work_dir} can be resumed from: {named.name} is '
        f'{"cut short" if named.is_file() else "gone"}, and no other one is whole and has an '
        'optimizer. Start anew without resuming, or from the weights of another file with '
        '--cfg-options load_from=FILE'
    )


def _iterations_of(file: Path) -> int:
    """Return after how many iterations a checkpoint was saved; -1 if no run can go on from it."""
    try:
        checkpoint = torch.load(file, map_location='cpu')
        return checkpoint['meta']['iter'] if 'optimizer' in checkpoint else -1
    except Exception:  # whatever lies in that folder: it is not ours
        return -1


def check_ema_state(checkpoint: dict, ema: BaseAveragedModel, file: str) -> None:
    """Raise ValueError if a checkpoint does not hold all of an average, naming what is missing."""
    how = _HOW_TO_GO_ON.format(file=file)
    if 'ema_state_dict' not in checkpoint:
        raise ValueError(
            f'{file} has no ema_state_dict: the run that wrote it had no EMAHook. {how}'
        )
    state = checkpoint['ema_state_dict']
    missing = [key for key in MomentumAveragedModel.module_and_steps(ema) if key not in state]
    if missing:
        raise ValueError(f'the EMA state in {file} lacks {listed(missing)}. {how}')
    own = ema.module.state_dict()
    other = [key for key, tensor in own.items() if state[f'module.{key}'].shape != tensor.shape]
    if other:
        raise ValueError(
            f'the EMA state in {file} has other shapes than the model for {listed(other)}. {how}'
        )
