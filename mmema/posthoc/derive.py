"""Averages made after a training: as if restarted, as if of another horizon, plain means."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np

from ..checkpoints.export import write_weights
from ..checkpoints.files import load
from ..checkpoints.formats import CheckpointError, State
from ..checkpoints.probe import structure
from ..run import MAIN
from .facts import FileFacts, check_same_run, facts_in
from .history import NOTHING, Given, average_config, average_in, momenta_between, repeats_tied
from .mixture import (
    STATISTICS,
    Pattern,
    Selected,
    Term,
    bytes_of,
    copied_in,
    mix,
    pattern_of,
    weights_in,
)
from .profiles import PLAIN, Fit, Kind, Stored
from .profiles import fit as fit_profiles
from .records import Passed, copied_by, passed_between

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
    selected, passed = _selected(other, name, given, trust), _passed(one, other, name, given)
    kept = passed.kept
    if kept == 1:
        raise CheckpointError(f'the average {name} was not updated between {before} and {after}')
    if kept > MOST_KEPT:
        raise CheckpointError(
            f'{kept:.2%} of the average in {after} is that of {before}, and more than '
            f'{MOST_KEPT:.0%} leaves too little: take files further apart than {passed.updates} '
            'updates'
        )
    pattern = pattern_of(load(other.file, trust), selected, other.recalibrates)
    shares = {}  # W, by how often a tensor is blended at an update
    for times in {1, *pattern.kinds.values()}:
        shares[times] = kept**times
    terms = [
        Term(one.file, name, {times: -w / (1 - w) for times, w in shares.items()}),
        Term(other.file, name, {times: 1 / (1 - w) for times, w in shares.items()}),
    ]
    state = mix(terms if kept else terms[1:], pattern, trust)
    lines = [
        ('average', f'{name}, as if restarted hard after {one.time}, at {other.time}'),
        ('updates', f'{passed.updates:,} between the files'),
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
    meta = _meta(other, name, record, steps=passed.updates)
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
    found = found or nearest(stored, wanted, force=force)
    last = stored[-1].facts
    used = [number for number, c in enumerate(found.coefficients) if abs(c) > 1e-12]
    pattern = _pattern(stored, used, trust)
    fits: dict = {1: found}
    for kind in {*pattern.kinds.values()} - {1}:
        fits[kind] = nearest(stored, wanted, kind, force)
        used = range(len(stored))
    terms = [
        Term(
            stored[number].facts.file,
            stored[number].weights,
            {kind: float(one.coefficients[number]) for kind, one in fits.items()},
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
    stored: Sequence[Stored], wanted: np.ndarray, kind: Kind = PLAIN, force: bool = False
) -> Fit:
    """Return the fit for tensors of a kind; refuse a bad one unless ``force``."""
    found = fit_profiles([one.profile(kind) for one in stored], wanted, MOST_SIZE)
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
    last file. A file with the weights of another one at the same iteration, as ``best_*.pth`` may
    be, counts once.

    Args:
        files: Two or more checkpoints of one model. Those of runs are put in the order of time;
            else the last one in time stands at the end.
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
    paths, same = _each_once(paths, weights, trust)
    if len(paths) < 2:
        raise CheckpointError(
            f'a mean is of at least two sets of weights, but {", ".join(same)} have those of '
            f'{paths[0].name}'
        )
    state = mix([Term(path, weights, {1: 1 / len(paths)}) for path in paths], trust=trust)
    meta = load(paths[-1], trust).meta
    about = {'weights': f'mean of {weights}', 'made': 'mean', 'of': [p.name for p in paths]}
    lines = [('mean', f'of the {weights} weights in {len(paths)} files')]
    if same:
        lines.append(('note', f'with the weights of another file, and left out: {", ".join(same)}'))
    if any(name.endswith(STATISTICS) for name in state):
        lines.append(('note', STATISTICS_NOTE))
    return Made(state, {**meta, 'mmema': about}, lines)


def _each_once(paths: Sequence[Path], weights: str, trust: bool) -> tuple[list[Path], list[str]]:
    """Return files of different weights in the order of time, and the names of those left out.

    Two files are compared where they are of one iteration. BatchNorm's statistics do not count: a
    checkpoint is saved before EMARecalibrateHook measures them, and the best one after it.
    """
    times = {path: structure(path).get('meta', {}).get('iter') for path in paths}
    known = {}
    if None not in times.values():
        paths = sorted(paths, key=lambda path: times[path])
    at = Counter(times.values())
    for path in sorted(paths, key=lambda path: path.name.startswith('best_')):
        weighed = path
        if at[times[path]] > 1:
            state = weights_in(load(path, trust), Term(path, weights, {}))
            floats = [(n, t) for n, t in state.items() if not n.endswith(STATISTICS)]
            digest = sha256()
            for name, tensor in sorted(floats):
                if tensor.is_floating_point():
                    digest.update(name.encode() + bytes_of(tensor))
            weighed = (times[path], digest.hexdigest())
        known.setdefault(weighed, path)
    kept = set(known.values())
    return [p for p in paths if p in kept], [p.name for p in paths if p not in kept]


STATISTICS_NOTE = (
    "BatchNorm's statistics are averaged too, and belong to no weights: measure them with "
    'mmema recalibrate CONFIG FILE -o OUT'
)


def _passed(one: FileFacts, other: FileFacts, name: str, given: Given) -> Passed:
    """Return what happened to an average between two files, from its record if it has one."""
    before, after = (average_in(file, name).record for file in (one, other))
    if before and after:
        return passed_between(before, after, (one, other), name)
    if after:
        raise CheckpointError(
            f'{one} has no record of the updates of {name}, and {other} has: when the run began '
            'to keep one is not known. Take two files of the same kind'
        )
    momenta = momenta_between(one, other, name, given)
    return Passed(len(momenta), float(np.prod(1 - momenta)))


def _selected(file: FileFacts, name: str, given: Given, trust: bool) -> Selected:
    """Return what an average of a run blends."""
    record, config = average_in(file, name).record, average_config(file, name)
    if record:
        floats = [n for n, (_, dtype) in file.tensors.items() if dtype.is_floating_point]
        configured = config.get('update_buffers', False), tuple(config.get('exclude', ()))
        blends_buffers, copied = copied_by(record, floats, configured)
        return Selected(name, copied, blends_buffers)
    blends_buffers = config.get('update_buffers', False) if file.hook else None
    copied = copied_in(file.file, name, trust)
    return Selected(name, copied, blends_buffers, repeats_tied(file, name, given))


def _pattern(stored: Sequence[Stored], used: Sequence[int], trust: bool) -> Pattern:
    """Return the pattern of a mixture: that of the main average, else of the first one used."""
    averages = {one.weights: one for one in stored if one.momenta is not None}
    names = [name for name in (stored[number].weights for number in used) if name in averages]
    last, selected = stored[-1].facts, None
    known = [name for name in (MAIN, *names) if name in averages and name in last.averages]
    if names and known:
        like = averages[known[0]]
        selected = Selected(known[0], like.copied, like.blends_buffers, like.repeats)
    pattern = pattern_of(load(last.file, trust), selected, last.recalibrates)
    if not names:
        return pattern
    times, kinds = pattern.kinds, {}
    for tensor in last.tensors:
        copying = frozenset(name for name, one in averages.items() if tensor in one.copied)
        kind = Kind(times.get(tensor, 1), copying)
        if kind != PLAIN and tensor not in pattern.copied:
            kinds[tensor] = kind
    return pattern._replace(kinds=kinds)


def _meta(file: FileFacts, name: str, record: dict, steps: int | None = None) -> dict:
    return {**file.meta, 'mmema': {'weights': name, 'steps': steps, **record}}
