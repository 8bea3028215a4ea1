"""The checkpoints that a run has left in its folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..checkpoints.probe import is_whole, structure


class Saved(NamedTuple):
    """A checkpoint of a run, without its tensors."""

    file: Path
    run: str  # the experiment's name, which ends with the folder of the log
    config: str  # its text
    epoch: int
    iteration: int
    epoch_length: int
    weights: list[str]  # names of the sets of weights in it

    @property
    def time(self) -> tuple[str, int]:
        """The epoch that it ends, or its iteration: unit and number."""
        ends_epoch = self.iteration == self.epoch * self.epoch_length
        return ('epoch', self.epoch) if ends_epoch else ('iter', self.iteration)


def checkpoints_in(folder: str | Path) -> tuple[list[Saved], list[str]]:
    """Return the checkpoints of a run in the order of time, and notes about those left out."""
    folder = Path(folder)
    note = folder / 'last_checkpoint'
    last = Path(note.read_text().strip()) if note.is_file() else note
    folders = {folder.resolve(): folder}
    if not (folder / last.name).is_file():  # they have a folder of their own: out_dir
        folders.setdefault(last.parent.resolve(), last.parent)
    found, notes = [], []
    for file in sorted(file for place in folders.values() for file in place.glob('*.pth')):
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
            found.append(Saved(file, name, config, epoch, iteration, length, weights))
    return sorted(found, key=lambda saved: saved.iteration), notes
