"""Profiles: the share of the weights after each iteration of a run in an average; and their fit.

A profile is a vector of float64 over the iterations of the run. A stored average is the sum of the
weights after every iteration, each times its share, so a mixture of stored averages has the mixture
of their profiles.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Sequence

import numpy as np

from ..arguments import check_integer
from ..checkpoints.formats import CheckpointError
from ..restarts.profile import shares
from ..schedules import DebiasedSchedule, ExpSchedule
from .facts import MAIN, FileFacts, check_same_run
from .history import average_config, average_in, momenta_between, repeats_tied
from .mixture import copied_in
from .records import History, copied_by, history_in


class Kind(NamedTuple):
    """Tensors with one profile in each average: blended as often, copied by the same ones."""

    times: int = 1  # names of a tied tensor, which a stock class may blend once for each
    copied_by: frozenset = frozenset()  # names of averages


PLAIN = Kind()


class Stored(NamedTuple):
    """One set of weights in a file, and how it was made."""

    facts: FileFacts
    weights: str
    total: int  # iterations of the run until its last file
    momenta: np.ndarray | None = None  # of all updates until this file; None of raw weights
    at: np.ndarray | None = None  # the iterations of the updates, from 0; None: of each one
    repeats: bool = False  # whether it blends a tied tensor once for each of its names
    copied: frozenset = frozenset()  # floating-point tensors that it copies
    blends_buffers: bool | None = None  # None: nothing says so

    def profile(self, kind: Kind = PLAIN) -> np.ndarray:
        """Return the share of each iteration, for tensors of a kind."""
        if self.momenta is None or self.weights in kind.copied_by:
            return single(self.facts.iteration, self.total)
        momenta = 1 - (1 - self.momenta) ** (kind.times if self.repeats else 1)
        profile, at = np.zeros(self.total), self.at
        profile[np.arange(len(momenta)) if at is None else at] = shares(momenta)
        return profile

    def __str__(self) -> str:
        return f'{self.weights} of {self.facts.file.name}'


class Fit(NamedTuple):
    """The mixture of profiles that is nearest to a wanted one."""

    coefficients: np.ndarray
    profile: np.ndarray
    error: float  # ||profile - wanted|| / ||wanted||

    @property
    def size(self) -> float:
        """The sum of the absolute coefficients, by which roundings of the files are enlarged."""
        return float(np.abs(self.coefficients).sum())


def stored_profiles(
    files: Sequence[FileFacts], trust: bool = False
) -> tuple[list[Stored], list[str]]:
    """Return all weights in a run's files with their profiles, and notes about those left out.

    Args:
        files: In the order of time, not two of one iteration.
        trust: As of :func:`mmema.checkpoints.files.load`.

    Raises:
        CheckpointError: If the files are not of one run, or none has raw weights.
    """
    notes = [f'{file} is left out: it has no raw weights' for file in files if not file.has_raw]
    files = [file for file in files if file.has_raw and file.iteration]
    if not files:
        raise CheckpointError('no file has raw weights, so the run cannot be followed')
    total, stored = files[-1].iteration, []
    for one, other in zip(files, files[1:]):
        check_same_run(one, other)
    for name in dict.fromkeys(name for file in files for name in file.averages):
        having = [file for file in files if name in file.averages]
        try:
            stored += _stored(having, name, total, trust)
        except CheckpointError as error:
            notes.append(f'{name} is left out: {error}')
    return stored + [Stored(file, 'raw', total) for file in files], notes


def _stored(files: Sequence[FileFacts], name: str, total: int, trust: bool) -> list[Stored]:
    """Return one average in all files that have it."""
    records = [average_in(file, name).record for file in files]
    last, repeats, config = files[-1], False, average_config(files[-1], name)
    if all(records):
        histories = [history_in(record, file, name) for record, file in zip(records, files)]
        configured = config.get('update_buffers', False), tuple(config.get('exclude', ()))
        floats = [n for n, (_, dtype) in last.tensors.items() if dtype.is_floating_point]
        blending = [record for record in records if record.selections_since(0)] or records[-1:]
        selected = {copied_by(record, floats, configured) for record in blending}
        if len(selected) > 1 or any(len(record.selections_since(0)) > 1 for record in records):
            raise CheckpointError('update_buffers or exclude was changed during the run')
        ((blends_buffers, copied),) = selected
    elif any(records):
        raise CheckpointError('only the later files have a record of its updates')
    else:
        histories = _histories(files, name)
        repeats = repeats_tied(last, name)
        blends_buffers = config.get('update_buffers', False) if last.hook else None
        copied = copied_in(last.file, name, trust)
    return [
        Stored(file, name, total, *history, repeats, copied, blends_buffers)
        for file, history in zip(files, histories)
    ]


def _histories(files: Sequence[FileFacts], name: str) -> list[History]:
    """Return for each file without a record the history of an average from the beginning to it."""
    pieces, ends, before = [], [], None
    for file in files:
        values = momenta_between(before, file, name)
        so_far = before.updates if before else 0
        missing = file.updates - so_far - len(values)
        if missing and not (before and missing > 0 and average_in(before, name).steps == 0):
            raise CheckpointError(
                f'{file} counts {len(values)} updates since iteration '
                f'{before.iteration if before else 0} instead of {file.updates - so_far}: steps of '
                'the optimizer were skipped'
            )
        pieces += [np.ones(missing), values]  # copies, before it began
        ends.append(file.updates)
        before = file
    whole = np.concatenate(pieces)
    at = np.array([files[-1].run.iteration_of(update) for update in range(len(whole))])
    return [History(whole[:end], at[:end]) for end in ends]


def single(iteration: int, total: int) -> np.ndarray:
    """Return the profile of the raw weights after so many iterations."""
    profile = np.zeros(total)
    profile[iteration - 1] = 1
    return profile


class Blends(NamedTuple):
    """Updates of an average that blend: their iterations, and their numbers among all updates."""

    at: np.ndarray
    number: np.ndarray

    @classmethod
    def at_all(cls, total: int) -> Blends:
        """Return one update at each of so many iterations."""
        return cls(np.arange(total), np.arange(total))


def blends_of(stored: Sequence[Stored]) -> Blends:
    """Return the updates at which a run's main average was blended, or copied.

    Those between them, which its ``interval`` leaves out, are in no average like it. Of a run
    without a main average they are all iterations.
    """
    of_main = [one for one in stored if one.weights == MAIN]
    if not of_main:
        return Blends.at_all(stored[-1].total)
    number = np.flatnonzero(of_main[-1].momenta)
    return Blends(number if of_main[-1].at is None else of_main[-1].at[number], number)


def uniform(start: int, total: int, blends: Blends | None = None) -> np.ndarray:
    """Return the profile of the plain mean of all updates from iteration ``start`` (from 0) on.

    Args:
        start: Iteration of its first update.
        total: Number of iterations of the run.
        blends: The updates that count. Defaults to one at each iteration.

    Example:
        >>> uniform(1, 3)
        array([0. , 0.5, 0.5])
    """
    (at, _), profile = _blends_from(start, total, blends), np.zeros(total)
    profile[at] = 1 / len(at)
    return profile


def exponential(
    momentum: float,
    gamma: float | None,
    start: int,
    total: int,
    blends: Blends | None = None,
) -> np.ndarray:
    """Return the profile of an exponential average that begins at iteration ``start``.

    Args:
        momentum: Weight of the new value, in (0, 1).
        gamma: Time constant of the warm-up in updates; None for the debiased average, without one.
        start: Iteration of its first update, from 0: where a hard restart would be.
        total: Number of iterations of the run.
        blends: The updates at which it is blended. Defaults to one at each iteration.

    Example:
        >>> exponential(0.5, None, 1, 4).round(4)  # 1/4, 1/2 and 1, divided by their sum
        array([0.    , 0.1429, 0.2857, 0.5714])
    """
    (at, number), profile = _blends_from(start, total, blends), np.zeros(total)
    if gamma is None:
        schedule, steps = DebiasedSchedule(momentum), np.arange(len(at))
    else:
        schedule, steps = ExpSchedule(momentum, gamma), number - number[0]
    profile[at] = shares(np.array([1.0, *(schedule(int(step)) for step in steps[1:])]))
    return profile


def _blends_from(start: int, total: int, blends: Blends | None) -> Blends:
    check_integer('the first iteration', start, least=0)
    at, number = blends or Blends.at_all(total)
    if not (at >= start).any():
        raise ValueError(f'the first iteration must be below the {total} of the run, got {start}')
    return Blends(at[at >= start], number[at >= start])


def fit(profiles: Sequence[np.ndarray], wanted: np.ndarray, most: float = math.inf) -> Fit:
    """Return the mixture of profiles that is nearest to the wanted one, in least squares.

    The coefficients sum to one; they may be negative. Of several solutions it is the smallest.
    Directions in which the profiles hardly differ are left out, more of them where the coefficients
    would be too large.

    Args:
        profiles: One or more vectors of the wanted one's length.
        wanted: The profile to come near to.
        most: The sum of the absolute coefficients that is aimed at. Defaults to any.

    Example:
        >>> import numpy as np
        >>> found = fit([np.array([1.0, 0, 0]), np.array([0.5, 0.5, 0])], np.array([0, 1.0, 0]))
        >>> found.coefficients.round(6), round(found.error, 6)
        (array([-1.,  2.]), 0.0)
    """
    base, *others = profiles
    differences = np.stack([other - base for other in others], axis=1) if others else None
    for least in (1e-9, 1e-5, 1e-4, 1e-3):  # of the singular values, to the largest
        coefficients = np.ones(1)
        if others:
            # With the first coefficient one minus the others, no constraint is left.
            rest = np.linalg.lstsq(differences, wanted - base, rcond=least)[0]
            coefficients = np.concatenate([[1 - rest.sum()], rest])
        profile = sum(c * p for c, p in zip(coefficients, profiles))
        error = np.linalg.norm(profile - wanted) / np.linalg.norm(wanted)
        found = Fit(coefficients, profile, float(error))
        if found.size <= most:
            break
    return found
