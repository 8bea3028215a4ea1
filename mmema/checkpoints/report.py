"""Report on a checkpoint: where its weights are, their distance, tensors that are not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Iterator, NamedTuple

import torch
from torch import Tensor

from ..averaged import schedule_name
from .files import load
from .formats import State, Weights


class Report(NamedTuple):
    """Findings of :func:`inspect`.

    Attributes:
        weights: The content; see :class:`mmema.checkpoints.formats.Weights`.
        distance: ``||average - raw|| / ||raw||`` over the floating-point tensors that both have,
            BatchNorm's running statistics apart; None without both.
        farthest: The three tensors with the largest distance of their own, and that distance.
        non_finite: Names of tensors with NaN or infinity, by 'average' and 'raw'.
    """

    weights: Weights
    distance: float | None
    farthest: list[tuple]
    non_finite: dict[str, list[str]]

    def lines(self) -> list[tuple]:
        """Return (label, text), a line each."""
        found = self.weights
        lines = [('made by', found.maker)]
        for label, state, place in (
            ('EMA weights', found.average, found.average_at),
            ('raw weights', found.raw, found.raw_at),
        ):
            lines.append((label, 'none' if state is None else f'{place}: {_summary(state)}'))
        if found.average is not None:
            lines.append(('updates', 'not said' if found.steps is None else f'{found.steps:,}'))
        lines += _live_lines(found.live)
        if 'epoch' in found.meta:
            lines.append(
                ('trained', f'epoch {found.meta["epoch"]}, iteration {found.meta.get("iter", "?")}')
            )
        if self.distance is not None:
            lines.append(('distance', f'{self.distance:.3g} = ||EMA - raw|| / ||raw||'))
            lines += [('', f'{own:.3g}  {name}') for name, own in self.farthest]
        for which, names in self.non_finite.items():
            lines += [('NaN or infinity', f'{which}: {name}') for name in names[:10]]
            if len(names) > 10:
                lines.append(('', f'and {len(names) - 10} more'))
        if not any(self.non_finite.values()):
            lines.append(('NaN or infinity', 'none'))
        return lines + [('note', note) for note in found.notes]


def inspect(path: str | Path, trust: bool = False) -> Report:
    """Report on a checkpoint.

    Args:
        path: The file; see :func:`mmema.checkpoints.files.load`.
        trust: Whether the file may hold any object; see :func:`mmema.checkpoints.files.load`.

    Returns:
        The report.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    found = load(path, trust)
    distance, farthest = None, []
    if found.average is not None and found.raw is not None:
        distance, farthest = _distances(found.average, found.raw)
    states = {'average': found.average or {}, 'raw': found.raw or {}}
    return Report(found, distance, farthest, {k: _non_finite(v) for k, v in states.items()})


def _distances(average: State, raw: State) -> tuple:
    """Return the relative distance of all weights, and the three tensors farthest apart."""
    names = [name for name in raw if _comparable(name, raw[name], average.get(name))]
    norms = [raw[name].double().norm().item() for name in names]
    apart = [(average[name].double() - raw[name].double()).norm().item() for name in names]
    if not names:
        return None, []
    own = [(name, _relative(*pair)) for name, *pair in zip(names, apart, norms)]
    farthest = sorted((pair for pair in own if pair[1] > 0), key=lambda pair: -pair[1])[:3]
    return _relative(math.hypot(*apart), math.hypot(*norms)), farthest


def _relative(difference: float, norm: float) -> float:
    if difference == 0:
        return 0.0  # two tensors of zeros too
    return difference / norm if norm else math.inf


def _comparable(name: str, tensor: Tensor, other: Tensor | None) -> bool:
    if name.endswith(('running_mean', 'running_var')):
        return False
    return tensor.is_floating_point() and other is not None and other.shape == tensor.shape


def _non_finite(state: State) -> list[str]:
    return [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not _is_finite(tensor)
    ]


def _is_finite(tensor: Tensor) -> bool:
    if tensor.element_size() == 1:  # torch has no isfinite for float8
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


def _summary(state: State) -> str:
    kinds = sorted({str(tensor.dtype)[6:] for tensor in state.values()})
    numbers = sum(tensor.numel() for tensor in state.values())
    return f'{len(state)} tensors, {numbers:,} numbers, {", ".join(kinds)}'


def _live_lines(live: dict) -> Iterator[tuple]:
    """Yield (label, text) for the schedule, its live values and the number of restarts."""
    if 'schedule' in live:
        yield 'schedule', schedule_name(live)
    for name, value in live.items():
        if value.dim() == 0 and not name.startswith('changed.'):
            number = value.item()
            yield name, f'{number:g}' if isinstance(number, float) else str(number)
