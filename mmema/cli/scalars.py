"""The curves that MMEngine's LocalVisBackend wrote in the folder of a run, all parts of it."""

from __future__ import annotations

import json
from typing import NamedTuple

from . import common as cli


class Validation(NamedTuple):
    """The metrics of one validation, and where in the run it was."""

    part: str  # folder of the log: the time at which this part of the run was started
    after: int  # the last training iteration that was logged before it
    point: dict  # 'step', which is its epoch or iteration, and the metrics by name

    def iteration(self, epoch_length):
        """Return the iterations before it.

        In epochs, ``step`` is below the logged iteration; else it is an iteration itself.
        """
        step = self.point['step']
        return step if step >= self.after else step * epoch_length


def read_points(folder):
    """Return training points and :class:`Validation` s of a run, a resumed one included."""
    if not folder.is_dir():
        cli.die(f'no folder {folder}')
    train, validations = {}, []
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        begin = True
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                point = json.loads(line)
            except json.JSONDecodeError:
                cli.note(f'note: line {number} of {path} is cut short and left out')
                continue
            if 'loss' not in point:
                part = path.parent.parent.name
                validations.append(Validation(part, max(train, default=0), point))
                continue
            if begin:  # an earlier part was done again from here on
                train = {at: p for at, p in train.items() if at < point['step']}
                validations = [one for one in validations if one.after < point['step']]
                begin = False
            train[point['step']] = point
    return list(train.values()), validations
