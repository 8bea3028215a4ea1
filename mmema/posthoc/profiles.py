"""Profiles: the share of the weights after each update of a run in an average; and their fit.

A profile is a vector of float64 over the updates of the run. A stored average is the sum of the
weights after every update, each times its share, so a mixture of stored averages has the mixture of
their profiles.
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
from .history import average_in, momenta_between, repeats_tied


class Stored(NamedTuple):
    """One set of weights in a file, and how it was made."""

    facts: FileFacts
    weights: str
    total: int  # updates of the run until its last file
    momenta: np.ndarray | None = None  # of all updates until this file; None of raw weights
    repeats: bool = False  # whether it blends a tied tensor once for each of its names

    def profile(self, times: int = 1) -> np.ndarray:
        """Return the share of each update, for tensors with so many names."""
        if self.momenta is None:
            return single(self.facts.updates, self.total)
        momenta = 1 - (1 - self.momenta) ** (times if self.repeats else 1)
        return np.concatenate([shares(momenta), np.zeros(self.total - len(momenta))])

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


def stored_profiles(files: Sequence[FileFacts]) -> tuple[list[Stored], list[str]]:
    """Return all weights in a run's files with their profiles, and notes about those left out.

    Args:
        files: In the order of time, not two of one iteration.

    Raises:
        CheckpointError: If the files are not of one run, or none has raw weights.
    """
    notes = [f'{file} is left out: it has no raw weights' for file in files if not file.has_raw]
    files = [file for file in files if file.has_raw and file.updates]
    if not files:
        raise CheckpointError('no file has raw weights, so the run cannot be followed')
    total, stored = files[-1].updates, []
    for one, other in zip(files, files[1:]):
        check_same_run(one, other)
    for name in dict.fromkeys(name for file in files for name in file.averages):
        having = [file for file in files if name in file.averages]
        try:
            histories = _histories(having, name)
        except CheckpointError as error:
            notes.append(f'{name} is left out: {error}')
            continue
        repeats = repeats_tied(files[-1], name)
        stored += [Stored(f, name, total, h, repeats) for f, h in zip(having, histories)]
    return stored + [Stored(file, 'raw', total) for file in files], notes


def _histories(files: Sequence[FileFacts], name: str) -> list[np.ndarray]:
    """Return for each file the momenta of all updates from the beginning of the run to it."""
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
    return [whole[:end] for end in ends]


def single(update: int, total: int) -> np.ndarray:
    """Return the profile of the raw weights after an update, counted from 1."""
    profile = np.zeros(total)
    profile[update - 1] = 1
    return profile


def blends_of(stored: Sequence[Stored]) -> np.ndarray:
    """Return the indices of the updates at which a run's main average was blended.

    Those between them, which its ``interval`` leaves out, are in no average like it. Of a run
    without a main average they are all updates.
    """
    of_main = [one.momenta for one in stored if one.weights == MAIN]
    return np.flatnonzero(of_main[-1]) if of_main else np.arange(stored[-1].total)


def uniform(start: int, total: int, blends: np.ndarray | None = None) -> np.ndarray:
    """Return the profile of the plain mean of all updates from index ``start`` (from 0) on.

    Args:
        start: Index of its first update.
        total: Number of updates of the run.
        blends: Indices of the updates that count. Defaults to all.

    Example:
        >>> uniform(1, 3)
        array([0. , 0.5, 0.5])
    """
    at, profile = _blends_from(start, total, blends), np.zeros(total)
    profile[at] = 1 / len(at)
    return profile


def exponential(
    momentum: float,
    gamma: float | None,
    start: int,
    total: int,
    blends: np.ndarray | None = None,
) -> np.ndarray:
    """Return the profile of an exponential average that begins with the update of index ``start``.

    Args:
        momentum: Weight of the new value, in (0, 1).
        gamma: Time constant of the warm-up in updates; None for the debiased average, without one.
        start: Index of its first update, from 0: where a hard restart would be.
        total: Number of updates of the run.
        blends: Indices of the updates at which it is blended. Defaults to all.

    Example:
        >>> exponential(0.5, None, 1, 4).round(4)  # 1/4, 1/2 and 1, divided by their sum
        array([0.    , 0.1429, 0.2857, 0.5714])
    """
    at, profile = _blends_from(start, total, blends), np.zeros(total)
    if gamma is None:
        schedule, steps = DebiasedSchedule(momentum), np.arange(len(at))
    else:
        schedule, steps = ExpSchedule(momentum, gamma), at - at[0]
    profile[at] = shares(np.array([1.0, *(schedule(int(step)) for step in steps[1:])]))
    return profile


def _blends_from(start: int, total: int, blends: np.ndarray | None) -> np.ndarray:
    check_integer('the first update', start, least=0)
    at = np.arange(start, total) if blends is None else blends[blends >= start]
    if not len(at):
        raise ValueError(f'the first update must be below the {total} of the run, got {start}')
    return at


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
