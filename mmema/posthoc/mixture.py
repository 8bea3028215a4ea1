"""Weighted sums of stored weights, in float64, with one file in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Sequence

import torch
from torch import Tensor

from ..checkpoints.files import load
from ..checkpoints.formats import CheckpointError, State, Weights, with_metadata
from ..messages import listed

STATISTICS = ('running_mean', 'running_var')


class Term(NamedTuple):
    """One set of weights in a file times a coefficient: a term of a weighted sum."""

    file: Path
    weights: str  # 'ema', 'raw' or the name of an average in also
    coefficients: dict[Any, float]  # by the kind of a tensor; see Pattern.kinds


class Pattern(NamedTuple):
    """Treatment of each tensor in a mixture."""

    copied: State  # taken as they are; others that are not floating-point are the last file's
    kinds: dict[str, Any]  # of tensors with coefficients of their own; of the others it is 1
    notes: list[str]  # for people


AS_IT_IS = Pattern({}, {}, [])


def mix(terms: Sequence[Term], pattern: Pattern = AS_IT_IS, trust: bool = False) -> State:
    """Return the sum of ``coefficient * weights``, each tensor in the widest dtype of its terms.

    Args:
        terms: Their coefficients sum to one.
        pattern: Defaults to one that sums all floating-point tensors.
        trust: As of :func:`mmema.checkpoints.files.load`.

    Raises:
        CheckpointError: If a file lacks the weights, they do not fit, a sum is not finite, or a
            variance negative.
    """
    by_file: dict = {}
    for term in terms:
        by_file.setdefault(term.file, []).append(term)
    copied, total = pattern.copied, _Sum(pattern.kinds)
    for file, own in by_file.items():
        found = load(file, trust)
        for term in own:
            state = weights_in(found, term)
            total.add({n: t for n, t in _floats(state).items() if n not in copied}, term)
    mixed = {n: copied[n] if n in copied else total.get(n, tensor) for n, tensor in state.items()}
    bad = [n for n, tensor in _floats(mixed).items() if not tensor.double().isfinite().all()]
    if bad:
        raise CheckpointError(f'the result is not finite in {listed(bad)}: look into the files')
    return with_metadata(state, mixed)


def weights_in(found: Weights, term: Term) -> State:
    """Return a set of weights; raise CheckpointError if the file does not have it."""
    sets = found.sets()
    if term.weights not in sets:
        raise CheckpointError(
            f'{term.file} has no {term.weights} weights; it has {", ".join(sets) or "none"}'
        )
    return sets[term.weights]


class Selected(NamedTuple):
    """An average of a run, and what it blends."""

    name: str
    copied: frozenset  # floating-point tensors that are copied
    blends_buffers: bool | None  # None to find out: then BatchNorm's statistics are not the raw's
    repeats: bool = False  # whether it blends a tied tensor once for each name, with buffers


def copied_in(file: Path, name: str, trust: bool = False) -> frozenset:
    """Return the floating-point tensors that an average without a record copies.

    That are those which average and source have in common, bit for bit; a constant one can be
    taken for copied.

    Raises:
        CheckpointError: If all are, so the average itself is a copy.
    """
    found = load(file, trust)
    average, floats = found.sets()[name], _floats(found.raw or {})
    copied = frozenset(n for n, tensor in floats.items() if _same(average[n], tensor))
    if len(copied) == len(floats):
        raise CheckpointError(
            f'{name} in {file} is a copy of the raw weights, so what it blends cannot be seen: '
            'leave the file out'
        )
    return copied


def pattern_of(found: Weights, selected: Selected | None, measured: bool = False) -> Pattern:
    """Return the pattern of a mixture of a run's averages and raw weights.

    Copied are all tensors that are not floating-point; those that the average copies; and
    BatchNorm's statistics, unless they were blended. They are taken from the source.

    Args:
        found: The last checkpoint, with raw weights.
        selected: The average that the mixture is to be like; None for one of raw weights alone.
        measured: Whether the run measured the statistics of its averages. Defaults to False.

    Raises:
        CheckpointError: If the average is of sixteen bits.
    """
    raw = found.raw or {}
    if selected is None:
        copied = {n: tensor for n, tensor in raw.items() if not tensor.is_floating_point()}
        return Pattern(copied, {}, [])
    average = found.sets()[selected.name]
    blended = {n for n in _floats(raw) if n not in selected.copied}
    coarse = sorted(n for n in blended if average[n].element_size() < 4)
    if coarse:
        raise CheckpointError(
            f'an average must be of 32 bits, got {average[coarse[0]].dtype} for '
            f'{listed(coarse)}: its updates were lost in rounding'
        )
    notes = []
    statistics = {n for n in raw if n.endswith(STATISTICS)}
    differ = any(not _same(average[n], raw[n]) for n in statistics)
    blends_buffers = differ if selected.blends_buffers is None else selected.blends_buffers
    if measured or not blends_buffers:
        blended -= statistics
        if differ:
            notes.append(
                "BatchNorm's statistics are those of the raw weights, since the average did not "
                'blend its own: EMARecalibrateHook measured them, or they are of the first update, '
                "as in MMYOLO's ExpMomentumEMA. mmema recalibrate measures them"
            )
    repeats = selected.repeats and blends_buffers
    times = _numbers_of_names(average, raw, blended) if repeats else {}
    if times:
        notes.append(
            f'{len(times)} tensors are tied, and the stock class blends them once for each name; '
            'this is taken into account'
        )
    return Pattern({n: t for n, t in raw.items() if n not in blended}, {**times}, notes)


def _numbers_of_names(average: State, raw: State, names: set[str]) -> dict[str, int]:
    """Return the number of names of each tied tensor, which has the same values under all of them.

    Whether names share their memory is lost where a checkpoint was written from a GPU.
    """
    groups: dict = {}
    for name in sorted(names):
        values = tuple(bytes_of(state[name]) for state in (average, raw))
        groups.setdefault((tuple(raw[name].shape), *map(hash, values)), []).append(name)
    return {name: len(group) for group in groups.values() if len(group) > 1 for name in group}


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _same(average: Tensor, source: Tensor) -> bool:
    return torch.equal(average, source.to(average.dtype))  # of sixteen bits, the average has more


def _floats(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


class _Sum:
    """Weighted sums of tensors by name, in float64."""

    def __init__(self, kinds: dict[str, Any]) -> None:
        self._kinds = kinds
        self._sums: dict = {}
        self._dtypes: dict = {}

    def add(self, state: State, term: Term) -> None:
        if self._sums and set(state) != set(self._sums):
            names = listed(sorted(set(state) ^ set(self._sums)))
            raise CheckpointError(f'{term.file} must have weights of one model, but {names} differ')
        for name, tensor in state.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(tensor.shape, dtype=torch.float64)
                self._dtypes[name] = tensor.dtype
            total, dtype = self._sums[name], self._dtypes[name]
            if total.shape != tensor.shape:
                raise CheckpointError(
                    f'{term.file} must have weights of one model, but {name} is of shape '
                    f'{tuple(tensor.shape)} instead of {tuple(total.shape)}'
                )
            coefficient = term.coefficients[self._kinds.get(name, 1)]
            total.add_(tensor.double(), alpha=coefficient)
            self._dtypes[name] = torch.promote_types(dtype, tensor.dtype)

    def get(self, name: str, default: Tensor) -> Tensor:
        if name not in self._sums:
            return default
        total = self._sums[name]
        if name.endswith('running_var'):
            if total.numel() and total.min() < -1e-6 * total.abs().max():
                raise CheckpointError(
                    f'{name} would be negative: these coefficients are too large for its values. '
                    'Take files further apart, or another average'
                )
            total = total.clamp(min=0)
        return total.to(self._dtypes[name])
