"""Weighted sums of stored weights, in float64, with one file in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from ..checkpoints.files import load
from ..checkpoints.formats import CheckpointError, State, Weights, with_metadata
from ..messages import listed

STATISTICS = ('running_mean', 'running_var')


class Part(NamedTuple):
    """One set of weights in a file, and its coefficient."""

    file: Path
    weights: str  # 'ema', 'raw' or the name of an average in also
    coefficient: float


def mix(parts: Sequence[Part], copied: State | None = None, trust: bool = False) -> State:
    """Return the sum of ``coefficient * weights``, each tensor in the widest dtype of its parts.

    Args:
        parts: Their coefficients sum to one.
        copied: Tensors that are taken as they are. Others that are not floating-point are taken
            from the last part. Defaults to None.
        trust: As of :func:`mmema.checkpoints.files.load`.

    Raises:
        CheckpointError: If a file lacks the weights, they do not fit, a sum is not finite, or a
            variance negative.
    """
    by_file: dict = {}
    for part in parts:
        by_file.setdefault(part.file, []).append(part)
    copied, total = copied or {}, _Sum()
    for file, own in by_file.items():
        found = load(file, trust)
        for part in own:
            state = weights_in(found, part)
            total.add({n: t for n, t in _floats(state).items() if n not in copied}, part)
    mixed = {n: copied[n] if n in copied else total.get(n, tensor) for n, tensor in state.items()}
    bad = [n for n, tensor in _floats(mixed).items() if not tensor.double().isfinite().all()]
    if bad:
        raise CheckpointError(f'the result is not finite in {listed(bad)}: look into the files')
    return with_metadata(state, mixed)


def weights_in(found: Weights, part: Part) -> State:
    """Return a set of weights; raise CheckpointError if the file does not have it."""
    sets = found.sets()
    if part.weights not in sets:
        raise CheckpointError(
            f'{part.file} has no {part.weights} weights; it has {", ".join(sets) or "none"}'
        )
    return sets[part.weights]


def copied_tensors(
    found: Weights, names: Sequence[str], blends_statistics: bool | None
) -> tuple[State, list[str]]:
    """Return the tensors of the source that its averages copied, and notes about them.

    Those are all that are not floating-point; all that average and source have in common, bit for
    bit: copied buffers, frozen parameters; and BatchNorm's statistics, unless they were blended.

    Args:
        found: A checkpoint with raw weights.
        names: The averages.
        blends_statistics: Whether the averages blended the statistics; None to find out: then they
            differ from the source's.
    """
    raw, sets = found.raw, found.sets()
    averages = [sets[name] for name in names if name != 'raw']
    if not averages:
        return {n: tensor for n, tensor in raw.items() if not tensor.is_floating_point()}, []
    differ = {n for n, t in _floats(raw).items() if any(not _same(a[n], t) for a in averages)}
    statistics = {n for n in raw if n.endswith(STATISTICS)}
    notes = []
    if blends_statistics is None:
        blends_statistics = bool(differ & statistics)
    elif not blends_statistics and differ & statistics:
        notes.append(
            "BatchNorm's statistics are those of the raw weights, since the average did not blend "
            'its own: EMARecalibrateHook measured them, or they are of the first update, as in '
            "MMYOLO's ExpMomentumEMA. tools/recalibrate_bn.py measures them"
        )
    blended = differ if blends_statistics else differ - statistics
    return {n: tensor for n, tensor in raw.items() if n not in blended}, notes


def _same(average: Tensor, source: Tensor) -> bool:
    return torch.equal(average, source.to(average.dtype))  # of sixteen bits, the average has more


def _floats(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


class _Sum:
    """Weighted sums of tensors by name, in float64."""

    def __init__(self) -> None:
        self._sums: dict = {}
        self._dtypes: dict = {}

    def add(self, state: State, part: Part) -> None:
        if self._sums and set(state) != set(self._sums):
            names = listed(sorted(set(state) ^ set(self._sums)))
            raise CheckpointError(f'{part.file} must have weights of one model, but {names} differ')
        for name, tensor in state.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(tensor.shape, dtype=torch.float64)
                self._dtypes[name] = tensor.dtype
            total, dtype = self._sums[name], self._dtypes[name]
            if total.shape != tensor.shape:
                raise CheckpointError(
                    f'{part.file} must have weights of one model, but {name} is of shape '
                    f'{tuple(tensor.shape)} instead of {tuple(total.shape)}'
                )
            total.add_(tensor.double(), alpha=part.coefficient)
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
