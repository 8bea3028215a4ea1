"""Record of an average: the momentum and the iteration of each of its updates, and their causes.

It is kept in the state of the average, compactly: something is added only where a run does not go
on as it did, so the record of a whole training has a few kilobytes.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any, Collection, List, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .schedules import BY_NAME

STATISTICS = ('running_mean', 'running_var')  # buffers of BatchNorm
MOST = 2000  # entries of a list; of more, the older half is dropped, and then said not to be known


class Segment(NamedTuple):
    """Settings of an average from one update on; a counter that rises by one with each update."""

    update: int  # the first one, counted from 0 over all updates of the average
    steps: int  # the counter that it finds
    schedule: str  # its name
    values: dict  # fields of the schedule
    interval: int
    update_buffers: bool
    exclude: list  # patterns of tensors that are copied

    def continues(self, other: Segment) -> bool:
        """Return whether this one says nothing new after another one."""
        goes_on = self.steps - self.update == other.steps - other.update
        return goes_on and self[2:] == other[2:]

    def momenta(self, updates: int) -> np.ndarray:
        """Return the momentum of the first so many updates: 0 where ``interval`` skips one."""
        if self.schedule not in BY_NAME:
            raise ValueError(f'the schedule {self.schedule!r} is not one of {", ".join(BY_NAME)}')
        schedule, values = BY_NAME[self.schedule](**self.values), np.zeros(updates)
        first = -self.steps % self.interval
        for number in range(first, updates, self.interval):
            values[number] = schedule.at(self.steps + number, self.interval)
        return values


class Record:
    """What happened to an average: kept by its updates themselves, and by a hook that knows more.

    An update adds only what cannot be told from the one before. So the record is right whatever
    moved the counter or a live value: a restart, an assignment, a changed config.
    """

    def __init__(self) -> None:
        self.updates = 0  # how many there have been
        self.kept = 0.0  # log of the product of all 1 - m since the last copy
        self.copy_is_due = False  # whether the next update copies wherever the counter is
        self.skipped = 0  # tensors that were left out of updates because they were not finite
        self.segments: List[Segment] = []
        self.copies: List[list] = []  # [first update, how many] that copied the source
        # [first iteration, distance, how many] at whose ends there were updates; where they are
        # fewer than the updates, those of the first ones are not known.
        self.iterations: List[list] = []
        self.parts: List[dict] = []  # a start or a resume of the training each; see run/record.py
        self.events: List[dict] = []  # for people
        self.copied: List[str] = []  # names of tensors that are copied, where the rule is to blend
        self.iteration: int | None = None  # of the next update, where a hook tells it; not saved
        self._settings: tuple | None = None  # as the last update was given them
        self._ahead = 0  # of the counter, before the number of the update

    # --- what updates and hooks add ---------------------------------------------------------------

    def add(self, steps: int, momentum: float | None, settings: tuple) -> None:
        """Add an update; it costs about a microsecond where nothing has changed.

        Args:
            steps: The counter that it found.
            momentum: 1 if it copied, None if it did not blend.
            settings: Schedule, interval, update_buffers and exclude of the average.
        """
        number = self.updates
        if momentum == 1:
            self._add_copy(number)
        else:
            if steps - number != self._ahead or settings != self._settings:
                self._add_segment(number, steps, settings)
            if momentum is not None:
                self.kept += math.log1p(-momentum)
        self.updates = number + 1
        self.copy_is_due = False
        if self.iteration is None:
            self.iterations.clear()
        else:
            self._add_iteration(self.iteration)
            self.iteration = None

    def _add_copy(self, number: int) -> None:
        self.kept = 0.0
        last = self.copies[-1] if self.copies else [number, 0]
        if sum(last) == number and self.copies:
            last[1] += 1
        else:
            self.copies.append([number, 1])
            _shorten(self.copies)

    def _add_segment(self, number: int, steps: int, settings: tuple) -> None:
        schedule, interval, update_buffers, exclude = self._settings = settings
        self._ahead = steps - number
        values = asdict(schedule)
        new = Segment(number, steps, schedule.name, values, interval, update_buffers, [*exclude])
        if not self.segments or not new.continues(self.segments[-1]):
            self.segments.append(new)
            _shorten(self.segments)

    def _add_iteration(self, iteration: int) -> None:
        if self.iterations:
            first, distance, count = last = self.iterations[-1]
            if count == 1 and iteration > first:
                last[1:] = iteration - first, 2
                return
            if count > 1 and iteration == first + distance * count:
                last[2] += 1
                return
        self.iterations.append([iteration, 1, 1])
        _shorten(self.iterations)

    def note(self, what: str, **more) -> dict:
        """Add an event for people to read; return it, to say more of it."""
        event = {'update': self.updates, 'what': what, **more}
        self.events.append(event)
        _shorten(self.events)
        return event

    def restarted(self, why: str) -> Record:
        """Return the record of an average whose weights were replaced by others."""
        new = Record()
        new.parts, new.events = self.parts, self.events
        new.note(why)
        return new

    # --- what tools ask ---------------------------------------------------------------------------

    def momenta(self) -> np.ndarray:
        """Return the momentum of each update: 1 of a copy, 0 of one without, NaN if not known."""
        values = np.full(self.updates, np.nan)
        ends = [segment.update for segment in self.segments[1:]] + [self.updates]
        for segment, end in zip(self.segments, ends):
            values[segment.update : end] = segment.momenta(end - segment.update)
        for first, count in self.copies:
            values[first : first + count] = 1
        return values

    def iterations_of_updates(self) -> np.ndarray:
        """Return the iteration, from 0, at whose end each update was made; -1 if not known."""
        runs = [first + distance * np.arange(n) for first, distance, n in self.iterations]
        known = np.concatenate([np.zeros(0, int), *runs])
        return np.concatenate([np.full(self.updates - len(known), -1), known])

    @property
    def is_whole(self) -> bool:
        """Whether all that the average is made of is known: it has begun with a copy."""
        return bool(self.copies) and not np.isnan(self.momenta()[self.last_copy :]).any()

    @property
    def last_copy(self) -> int:
        """The number of the last update that copied; -1 if there was none."""
        return sum(self.copies[-1]) - 1 if self.copies else -1

    def begins_with(self, earlier: Record) -> bool:
        """Return whether the average of an earlier record was this one's, some updates ago."""
        return (
            earlier.updates <= self.updates
            and self._settings_until(earlier.updates) == earlier._settings_until(earlier.updates)
            and self._copies_until(earlier.updates) == earlier._copies_until(earlier.updates)
            and np.array_equal(
                self.iterations_of_updates()[: earlier.updates], earlier.iterations_of_updates()
            )
        )

    def _settings_until(self, update: int) -> list:
        return [segment for segment in self.segments if segment.update < update]

    def _copies_until(self, update: int) -> list:
        return [[at, min(n, update - at)] for at, n in self.copies if at < update]

    def share_of(self, earlier: Record) -> float:
        """Return the share that the average of an earlier record has in this one.

        It is 1 where no update between the two has blended.
        """
        if self.last_copy >= earlier.updates:
            return 0.0
        return math.exp(self.kept - earlier.kept)

    def selections_since(self, update: int) -> list:
        """Return what was blended from an update on: (update_buffers, exclude), each once.

        A copy has taken in all tensors alike, so only the updates after the last one count.
        """
        since, found = max(update, self.last_copy + 1), []
        ends = [segment.update for segment in self.segments[1:]] + [self.updates]
        for segment, end in zip(self.segments, ends):
            selection = (segment.update_buffers, tuple(segment.exclude))
            if end > since and selection not in found:
                found.append(selection)
        return found

    # --- the state --------------------------------------------------------------------------------

    def encode(self) -> Tensor:
        """Return it as JSON in ASCII, in a tensor, which any checkpoint can hold."""
        content = {k: v for k, v in vars(self).items() if k[0] != '_' and k != 'iteration'}
        text = json.dumps(content, separators=(',', ':'), default=_plain)
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    @classmethod
    def decode(cls, tensor: Tensor) -> Record:
        """Return the record in a tensor; raise ValueError if it cannot be read."""
        try:
            content = json.loads(bytes(tensor.tolist()))
            record = cls()
            for key in vars(record):
                if key in content:
                    setattr(record, key, content[key])
            record.segments = [Segment(*segment) for segment in record.segments]
            if record.segments:
                record._ahead = record.segments[-1].steps - record.segments[-1].update
            record.iterations_of_updates()
            return record
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f'the record of an average must be JSON in a uint8 tensor, got {error}'
            ) from None


def blends_by_rule(name: str, update_buffers: bool, exclude: Collection[str]) -> bool:
    """Return whether an average blends a floating-point tensor, as far as its name tells."""
    excluded = any(fnmatchcase(name, pattern) for pattern in exclude)
    return not excluded and (update_buffers or not name.endswith(STATISTICS))


def _shorten(entries: list) -> None:
    if len(entries) > MOST:
        del entries[: MOST // 2]


def _plain(value: Any) -> float:
    return float(value)  # of numpy
