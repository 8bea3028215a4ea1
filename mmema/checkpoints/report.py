"""Report on a checkpoint: where its weights are, their distance, tensors that are not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Iterator, NamedTuple

from ..averaged import schedule_name
from ..messages import listed
from ..record import Record
from .files import load
from .formats import State, Weights


class Report(NamedTuple):
    """Findings of :func:`inspect`."""

    weights: Weights
    distance: float | None  # ||average - raw|| / ||raw||; None without both
    non_finite: dict[str, list[str]]  # names of tensors with NaN or infinity by set of weights
    distances: dict[str, float | None]  # of the other averages of a run, by name

    def lines(self) -> list[tuple]:
        """Return (label, text), a line each."""
        found = self.weights
        lines = [
            ('made by', found.maker),
            ('EMA weights', _summary(found.average, found.average_at)),
            ('raw weights', _summary(found.raw, found.raw_at)),
        ]
        if found.average is not None:
            lines.append(('updates', 'not said' if found.steps is None else f'{found.steps:,}'))
        lines += _live_lines(found.live)
        lines += [('history', line) for line in history_of(found.record)]
        if 'epoch' in found.meta:
            lines.append(
                ('trained', f'epoch {found.meta["epoch"]}, iteration {found.meta.get("iter", "?")}')
            )
        if self.distance is not None:
            lines.append(('distance', f'{self.distance:.3g} = ||EMA - raw|| / ||raw||'))
        for name, other in found.also.items():
            parts = [f'updates {other.steps:,}' if other.steps is not None else 'no `steps`']
            parts += [f'{label} {text}' for label, text in _live_lines(other.live)]
            if self.distances[name] is not None:
                parts.append(f'distance {self.distances[name]:.3g}')
            lines.append((f'also {name}', ', '.join(parts)))
            lines += [(f'history {name}', line) for line in history_of(other.record)]
        bad = [f'{which}: {listed(names)}' for which, names in self.non_finite.items() if names]
        lines += [('NaN or infinity', text) for text in bad or ['none']]
        return lines + [('note', note) for note in found.notes]


def history_of(record: Record | None) -> list[str]:
    """Return what happened to an average, in the order of time, a line each."""
    if record is None:
        return []
    at = record.iterations_of_updates()
    lines = []  # (update, order, text)
    for part in record.parts:
        unit = part['epoch_length'] and f', epochs of {part["epoch_length"]} iterations'
        update = int((at < part['iteration']).sum())
        text = f'{"resumed" if part["iteration"] else "started"} at iteration {part["iteration"]}'
        batch = f'batch {part["batch"]}' + (
            f' on each of {part["ranks"]} ranks' if part['ranks'] > 1 else ''
        )
        every = f', an update in {part["accumulation"]}' if part['accumulation'] > 1 else ''
        lines.append((update, 0, f'{text}{unit or ""}, {batch}{every} (log {part["log"]})'))
    for event in record.events:
        apart = ('what', 'update')
        more = [f'{k} {_shown(v)}' for k, v in event.items() if k not in apart and v is not None]
        lines.append((event['update'], 1, ', '.join([event['what'], *more])))
    for first, count in record.copies:
        lines.append((first, 2, 'copied' if count == 1 else f'copied, {count} updates'))
    for segment in record.segments:
        values = [f'{key} {value:g}' for key, value in segment.values.items()]
        more = [f'interval {segment.interval}'] if segment.interval > 1 else []
        more += ['blended buffers'] if segment.update_buffers else []
        more += [f'without {", ".join(segment.exclude)}'] if segment.exclude else []
        text = ', '.join([segment.schedule, *values, *more])
        lines.append((segment.update, 3, f'{text}, from counter {segment.steps} on'))
    return [f'update {update:,}: {text}' for update, _, text in sorted(lines)]


def _shown(value) -> str:
    return ', '.join(map(str, value)) if isinstance(value, list) else f'{value}'


def inspect(path: str | Path, trust: bool = False) -> Report:
    """Report on a checkpoint; see :func:`mmema.checkpoints.files.load` for arguments and errors."""
    found = load(path, trust)
    average, raw = found.average or {}, found.raw or {}
    others = {name: other.average for name, other in found.also.items()}
    states = {'average': average, 'raw': raw, **{f'also {n}': s for n, s in others.items()}}
    non_finite = {which: _non_finite(state) for which, state in states.items()}
    distances = {name: _distance(state, raw) for name, state in others.items()}
    return Report(found, _distance(average, raw), non_finite, distances)


def _distance(average: State, raw: State) -> float | None:
    """Return ``||average - raw|| / ||raw||`` over the floating-point tensors that both have.

    BatchNorm's running statistics, which no optimizer moves, are left out.
    """
    names = [
        name
        for name, tensor in raw.items()
        if tensor.is_floating_point()
        and name in average
        and average[name].shape == tensor.shape
        and not name.endswith(('running_mean', 'running_var'))
    ]
    if not names:
        return None
    norm = math.hypot(*(raw[name].double().norm() for name in names))
    apart = math.hypot(*((average[name].double() - raw[name].double()).norm() for name in names))
    if norm == 0:
        return math.inf if apart else 0.0
    return apart / norm


def _non_finite(state: State) -> list[str]:
    # As float64, because torch has no isfinite for float8.
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    return [name for name, tensor in floats.items() if not tensor.double().isfinite().all()]


def _summary(state: State | None, place: str) -> str:
    if state is None:
        return 'none'
    kinds = sorted({str(tensor.dtype)[6:] for tensor in state.values()})
    numbers = sum(tensor.numel() for tensor in state.values())
    return f'{place}: {len(state)} tensors, {numbers:,} numbers, {", ".join(kinds)}'


def _live_lines(live: dict) -> Iterator[tuple]:
    """Yield (label, text) for the schedule, its live values and the number of restarts."""
    if 'schedule' in live:
        yield 'schedule', schedule_name(live)
    for name, value in live.items():
        if value.dim() == 0 and not name.startswith('changed.'):
            yield name, f'{value.item():g}'
