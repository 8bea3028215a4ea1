"""Choice and checks of the checkpoint that a run is resumed from."""

from __future__ import annotations

from pathlib import Path

from mmengine.model import BaseAveragedModel
from mmengine.runner import Runner

from ..averaged import state_keys
from ..messages import RunError, listed, warn
from .probe import is_whole, top_level_keys

# Prefix of the copies of best checkpoints that are kept for restarts.
KEPT = 'best_before_restart_at_'


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
    files = {file for folder in (work_dir, named.parent) for file in folder.glob('*.pth')}
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
    own = ema.module.state_dict()
    other = [key for key, tensor in own.items() if state[f'module.{key}'].shape != tensor.shape]
    if other:
        raise RunError(
            f'the EMA state in {file} has other shapes than the model for {listed(other)}. {how}'
        )
