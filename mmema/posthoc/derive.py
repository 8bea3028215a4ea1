"""Averages made after a training: as if restarted, as if of another horizon, plain means."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np

from ..checkpoints.export import write_weights
from ..checkpoints.files import load
from ..checkpoints.formats import CheckpointError, State
from ..run import MAIN
from .facts import FileFacts, check_same_run, facts_in
from .history import NOTHING, Given, average_config, momenta_between, repeats_tied
from .mixture import STATISTICS, Pattern, Term, mix, pattern_of
from .profiles import Fit, Stored
from .profiles import fit as fit_profiles

MOST_KEPT = 0.99  # of `restart`: more than this share of the later average is the earlier one's
MOST_ERROR = 0.1  # of `fit`: relative error of the profile
MOST_SIZE = 1000  # of `fit`: sum of the absolute coefficients
ROUNDING = 2.0**-24  # of float32, relative


class Made(NamedTuple):
    """Weights made from stored ones, and how."""

    state: State
    meta: dict  # of the new file; meta['mmema'] has the recipe
    lines: list[tuple]  # (label, text) for people

    def write(self, out: str | Path, force: bool = False) -> Path:
        """Write a checkpoint for inference; raise CheckpointError if it cannot be written."""
        return write_weights(Path(out), self.state, self.meta, force)


def restart(
    before: str | Path,
    after: str | Path,
    name: str = MAIN,
    given: Given = NOTHING,
    trust: bool = False,
) -> Made:
    """Return an average as if it had been restarted at the earlier of two checkpoints.

    ``A' = (A_t - W A_s) / (1 - W)`` with ``W`` the product of ``1 - m`` over the updates between:
    the average of all weights after the earlier file, each in its proportion.

    Args:
        before: The earlier checkpoint of a run with an EMAHook, stock or ours.
        after: The later one.
        name: 'ema', the main average, or its name in ``also``. Defaults to 'ema'.
        given: What the files do not say. Defaults to nothing.
        trust: As of :func:`mmema.checkpoints.files.load`.

    Raises:
        CheckpointError: If the files are not of one run in this order, do not say how the average
            was updated, or the later average is of before for more than 99 %.
    """
    one, other = facts_in(before, trust), facts_in(after, trust)
    notes = check_same_run(one, other)
    momenta = momenta_between(one, other, name, given)
    if not momenta.any():
        raise CheckpointError(f'the average {name} was not updated between {before} and {after}')
    kept = float(np.prod(1 - momenta))
    if kept > MOST_KEPT:
        raise CheckpointError(
            f'{kept:.2%} of the average in {after} is that of {before}, and more than '
            f'{MOST_KEPT:.0%} leaves too little: take files further apart than {len(momenta)} '
            'updates'
        )
    pattern = _pattern(other, [name], repeats_tied(other, name, given), trust)
    shares = {}  # W, by how often a tensor is blended at an update
    for times in {1, *pattern.times.values()}:
        shares[times] = kept**times
    terms = [
        Term(one.file, name, {times: -w / (1 - w) for times, w in shares.items()}),
        Term(other.file, name, {times: 1 / (1 - w) for times, w in shares.items()}),
    ]
    state = mix(terms if kept else terms[1:], pattern, trust)
    lines = [
        ('average', f'{name}, as if restarted hard after {one.time}, at {other.time}'),
        ('updates', f'{len(momenta):,} between the files'),
        ('W', f'{kept:.4g} of the later average was of before'),
        ('rounding', f'that of the updates between, enlarged {1 / (1 - kept):.3g} times'),
    ]
    if kept == 0:
        lines[-1:] = [
            (
                'note',
                f'a copy of the weights was between the files, so the later one has nothing of '
                f'before: its own {name} weights are the result',
            )
        ]
    record = {'made': 'restart', 'after': one.time, 'at': other.time, 'kept': kept}
    meta = _meta(other, name, record, steps=len(momenta))
    return Made(state, meta, lines + [('note', text) for text in notes + pattern.notes])


def fit(
    stored: Sequence[Stored],
    wanted: np.ndarray,
    record: dict | None = None,
    force: bool = False,
    trust: bool = False,
    found: Fit | None = None,
) -> tuple[Made, Fit]:
    """Return the mixture of stored weights that is nearest to a wanted average, and its fit.

    Args:
        stored: Weights in the files of one run; see :func:`stored_profiles`.
        wanted: The profile of the wanted average, over all updates of the run.
        record: More about it to keep in ``meta['mmema']``. Defaults to None.
        force: Whether a bad fit is taken. Defaults to False.
        trust: As of :func:`mmema.checkpoints.files.load`.
        found: The mixture, if :func:`nearest` was asked before. Defaults to None.

    Raises:
        CheckpointError: If the profile is off by more than 10 %, or the coefficients are so large
            that they spoil the weights, unless ``force``.
    """
    if not stored:
        raise CheckpointError('there are no averages and no raw weights to mix')
    found = found or nearest(stored, wanted, 1, force)
    last = stored[-1].facts
    used = [number for number, c in enumerate(found.coefficients) if abs(c) > 1e-12]
    names = list(dict.fromkeys(stored[number].weights for number in used))
    pattern = _pattern(last, names, any(stored[number].repeats for number in used), trust)
    fits = {1: found}
    for times in {*pattern.times.values()} - {1}:
        fits[times] = nearest(stored, wanted, times, force)
        used = range(len(stored))
    terms = [
        Term(
            stored[number].facts.file,
            stored[number].weights,
            {times: float(one.coefficients[number]) for times, one in fits.items()},
        )
        for number in used
    ]
    state = mix(terms, pattern, trust)
    error = max(one.error for one in fits.values())
    size = max(one.size for one in fits.values())
    files = len({term.file for term in terms})
    lines = [
        ('profile', f'{error:.2%} off the wanted one'),
        ('coefficients', f'{len(terms)} in {files} files, {size:.3g} without their signs'),
        ('rounding', f'{size * ROUNDING:.1g} of a weight at most, in float32 files'),
        *(('note', text) for text in pattern.notes),
    ]
    record = {'made': 'fit', 'error': error, **(record or {})}
    return Made(state, _meta(last, 'ema', record), lines), found


def nearest(
    stored: Sequence[Stored], wanted: np.ndarray, times: int = 1, force: bool = False
) -> Fit:
    """Return the fit for tensors that are blended so often; refuse a bad one unless ``force``."""
    found = fit_profiles([one.profile(times) for one in stored], wanted, MOST_SIZE)
    if found.error > MOST_ERROR and not force:
        raise CheckpointError(
            f'the nearest mixture is {found.error:.1%} off the wanted profile, more than '
            f'{MOST_ERROR:.0%}: it needs more checkpoints, or averages of other horizons in also. '
            '--force (force=True) takes it all the same'
        )
    if found.size > MOST_SIZE and not force:
        raise CheckpointError(
            f'the coefficients sum to {found.size:,.0f} without their signs, more than '
            f'{MOST_SIZE:,}: the roundings of the files would be enlarged as much. '
            '--force (force=True) takes them all the same'
        )
    return found


def taken(stored: Stored, trust: bool = False) -> Made:
    """Return stored weights as they are."""
    state = mix([Term(stored.facts.file, stored.weights, {1: 1.0})], trust=trust)
    meta = _meta(stored.facts, stored.weights, {'made': 'stored', 'at': stored.facts.time})
    return Made(state, meta, [('weights', str(stored))])


def mean(files: Sequence[str | Path], weights: str = 'raw', trust: bool = False) -> Made:
    """Return the plain mean of one set of weights over files.

    Floating-point tensors are averaged, BatchNorm's statistics too; all others are those of the
    last file.

    Args:
        files: Two or more checkpoints of one model, the last one in time at the end.
        weights: 'raw', 'ema' or a name in ``also``. Defaults to 'raw'.
        trust: As of :func:`mmema.checkpoints.files.load`.

    Raises:
        CheckpointError: If the files are fewer than two, one is named twice, or they are of
            different models or lack the weights.
    """
    paths = [Path(file) for file in files]
    if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise CheckpointError(
            f'a mean is of at least two files, each once, got {", ".join(map(str, paths)) or None}'
        )
    state = mix([Term(path, weights, {1: 1 / len(paths)}) for path in paths], trust=trust)
    meta = load(paths[-1], trust).meta
    about = {'weights': f'mean of {weights}', 'made': 'mean', 'of': [p.name for p in paths]}
    lines = [('mean', f'of the {weights} weights in {len(paths)} files')]
    if any(name.endswith(STATISTICS) for name in state):
        lines.append(('note', STATISTICS_NOTE))
    return Made(state, {**meta, 'mmema': about}, lines)


STATISTICS_NOTE = (
    "BatchNorm's statistics are averaged too, and belong to no weights: measure them with "
    'mmema recalibrate CONFIG FILE -o OUT'
)


def _pattern(file: FileFacts, names: Sequence[str], repeats: bool, trust: bool) -> Pattern:
    """Return the pattern of a mixture of a run's averages; ``file`` is the last one."""
    names = [name for name in names if name in file.averages]
    blends = [average_config(file, name).get('update_buffers', False) for name in names]
    known = all(blends) if file.hook else None
    return pattern_of(load(file.file, trust), names, known, file.recalibrates, repeats)


def _meta(file: FileFacts, name: str, record: dict, steps: int | None = None) -> dict:
    return {**file.meta, 'mmema': {'weights': name, 'steps': steps, **record}}
