"""The checkpoints that a run has left in its folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..checkpoints.probe import checkpoint_files, is_whole, structure


class Saved(NamedTuple):
    """A checkpoint of a run, without its tensors."""

    file: Path
    run: str  # the experiment's name, which ends with the folder of the log
    config: str  # its text
    epoch: int
    iteration: int
    epoch_length: int  # in the part of the run that wrote it
    weights: list[str]  # names of the sets of weights in it
    has_record: bool  # of its main average


def checkpoints_in(folder: str | Path) -> tuple[list[Saved], list[str]]:
    """Return the checkpoints of a run in the order of time, and notes about those left out."""
    folder = Path(folder)
    note = folder / 'last_checkpoint'
    last = Path(note.read_text().strip()) if note.is_file() else note
    folders = {folder.resolve(): folder}
    if not (folder / last.name).is_file():  # they have a folder of their own: out_dir
        folders.setdefault(last.parent.resolve(), last.parent)
    found, notes = [], []
    for file in sorted(file for place in folders.values() for file in checkpoint_files(place)):
        if not is_whole(file):
            notes.append(f'{file} is cut short and left out')
            continue
        content = structure(file)
        with suppress(KeyError, TypeError, AttributeError):  # other files, exported ones
            meta, info = content['meta'], content['message_hub']['runtime_info']
            # Where there is no average, `state_dict` has the raw weights.
            weights = ['ema', 'raw', *content.get('ema_also', {})]
            weights = weights if 'ema_state_dict' in content else ['raw']
            name, config = meta['experiment_name'], meta.get('cfg', '')
            epoch, iteration = int(meta['epoch']), int(meta['iter'])
            length = info['max_iters'] // info['max_epochs']
            record = 'record' in content.get('ema_state_dict', {})
            found.append(Saved(file, name, config, epoch, iteration, length, weights, record))
    return sorted(found, key=lambda saved: saved.iteration), notes
