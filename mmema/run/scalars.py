"""The curves of a run, from the files that MMEngine's LocalVisBackend wrote in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

# In the points of the training alone: a validation may have a metric called 'loss'.
TRAINING = 'iter'


class Validation(NamedTuple):
    """The metrics of one validation, and where in the run it was."""

    part: str  # folder of the log: the time at which this part of the run was started
    after: int  # the last training iteration that was logged before it
    point: dict  # 'step', which is its epoch or iteration, and the metrics by name

    def iteration(self, part: dict) -> int:
        """Return the iterations before it.

        In epochs, ``step`` is below the iterations that are over; else it is an iteration itself.

        Args:
            part: The part of the run that logged it, as in a record: see ``run/record.py``.
        """
        step = self.point['step']
        if part['epoch_length'] is None or step >= max(self.after, part['iteration']):
            return step
        return part['iteration'] + (step - part['epoch']) * part['epoch_length']


class Scalars(NamedTuple):
    """All points that a run has logged; both lists are empty without a LocalVisBackend."""

    train: list[dict]  # in the order of time
    validations: list[Validation]
    notes: list[str]  # for people

    @property
    def names(self) -> list[str]:
        """The names in the validations, in the order of the log."""
        return list(dict.fromkeys(name for one in self.validations for name in one.point))

    def curve(self, name: str) -> list[tuple]:
        """Return a metric over time: (step, value) pairs."""
        points = [one.point for one in self.validations]
        return sorted((point['step'], point[name]) for point in points if name in point)


def read_scalars(folder: str | Path) -> Scalars:
    """Return what the run in a folder has logged, in all parts of it if it was resumed."""
    train: dict = {}
    validations: list[Validation] = []
    notes = []
    for path in sorted(Path(folder).glob('*/vis_data/scalars.json')):
        begin = True
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                point = json.loads(line)
            except json.JSONDecodeError:
                notes.append(f'line {number} of {path} is cut short and left out')
                continue
            if TRAINING not in point:
                part = path.parent.parent.name
                validations.append(Validation(part, max(train, default=0), point))
                continue
            if begin:  # an earlier part was done again from here on
                train = {at: p for at, p in train.items() if at < point['step']}
                validations = [one for one in validations if one.after < point['step']]
                begin = False
            train[point['step']] = point
    return Scalars(list(train.values()), validations, notes)
