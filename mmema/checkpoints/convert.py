"""Conversion of another training code's checkpoint to one that an MMEngine run resumes from."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch

from ..schedules import ExpSchedule
from .export import compact
from .files import check_output, load, write_whole
from .formats import CheckpointError, State, Weights

TARGETS = ('mmema', 'mmengine')


def convert(
    path: str | Path,
    out: str | Path,
    to: str = 'mmema',
    steps: int | None = None,
    momentum: float | None = None,
    gamma: float | None = None,
    rename: dict[str, str] | None = None,
    force: bool = False,
    trust: bool = False,
) -> list[str]:
    """Write the average, the raw weights and the counter as a checkpoint of an MMEngine run.

    A Runner resumes from it at epoch 0 with ``resume=True``, with a new optimizer. The counter is
    the same number in all codes: ``steps``, ``updates``, ``n_averaged``. The decay is in none of
    the files but in the config of the training code; see docs/migration.md.

    Args:
        path: The checkpoint; see :func:`mmema.checkpoints.files.load`.
        out: The new file, ``.pth`` or ``.pt``.
        to: 'mmema', with the schedule of a restartable average where the file or ``momentum`` and
            ``gamma`` give it, or 'mmengine', without. Defaults to 'mmema'.
        steps: The number of updates, where the file does not say. Defaults to None.
        momentum: Only with ``to='mmema'`` and ``gamma``: the schedule of
            RestartableExpMomentumEMA, which then wins over the config's. Defaults to None.
        gamma: See ``momentum``.
        rename: New beginnings of names by old ones; the longest that fits is used.
        force: Whether an existing file may be replaced. Defaults to False.
        trust: Whether the file may hold any object; see :func:`mmema.checkpoints.files.load`.

    Returns:
        Losses and assumptions, a line each.

    Raises:
        CheckpointError: If the checkpoint cannot be read or converted, or the new file cannot be
            written.
    """
    out = Path(out)
    check_output(out, ('.pth', '.pt'), force)
    if to not in TARGETS:
        raise CheckpointError(f'to must be one of {", ".join(TARGETS)}, got {to!r}')
    found = load(path, trust)
    if momentum is not None or gamma is not None:
        _set_schedule(found, to, momentum, gamma)
    _set_steps(found, steps, path)
    notes = [*found.notes, *_complete(found)]
    if to == 'mmengine' and found.live:
        found.live = {}
        notes.append('mmengine keeps no schedule: live values and restarts are left out')
    found.average = compact(_renamed(found.average, rename or {}))
    found.raw = compact(_renamed(found.raw, rename or {}))
    content = _mmengine_checkpoint(found)
    write_whole(out, lambda file: torch.save(content, file), force, named_by_hash=False)
    return notes


def _set_schedule(found: Weights, to: str, momentum: float | None, gamma: float | None) -> None:
    """Give the average an exponential schedule, as if a restart had set both values."""
    if to != 'mmema' or momentum is None or gamma is None:
        raise CheckpointError("momentum and gamma are given together, and only with to='mmema'")
    try:
        schedule = ExpSchedule(momentum, gamma)
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(error)) from None
    found.live = {
        'schedule': torch.tensor(list(schedule.name.encode()), dtype=torch.uint8),
        'momentum': torch.tensor(momentum, dtype=torch.float64),
        'gamma': torch.tensor(gamma, dtype=torch.float64),
        'changed.momentum': torch.tensor(True),  # else the config's values would win
        'changed.gamma': torch.tensor(True),
        'restarts': found.live.get('restarts', torch.tensor(0)),
    }


def _set_steps(found: Weights, steps: int | None, path: str | Path) -> None:
    if steps is not None and steps < 0:
        raise CheckpointError(f'steps must be at least 0, got {steps}')
    found.steps = found.steps if steps is None else steps
    if found.steps is None:
        raise CheckpointError(
            f'{path} does not say how many updates its average has had, and the warm-up of the '
            'schedule goes on from there: give steps=N (iterations trained, for most codes)'
        )


def _complete(found: Weights) -> list[str]:
    """Let one set of weights stand for the other where a file has only one, and say so."""
    if found.average is None:
        found.average = found.raw
        return ['no EMA weights in the file: the average is a copy of the raw weights']
    if found.raw is None:
        found.raw = found.average
        return ['no raw weights in the file: training goes on from the average']
    return []


def _renamed(state: State, rename: dict[str, str]) -> State:
    if not rename:
        return state
    unused = [old for old in rename if not any(name.startswith(old) for name in state)]
    if unused:
        raise CheckpointError(
            f'no name begins with {unused[0]!r}; the first is {next(iter(state), None)!r}'
        )
    new = {}
    for name, tensor in state.items():
        fits = [old for old in rename if name.startswith(old)]
        best = max(fits, key=len) if fits else ''
        key = rename[best] + name[len(best) :] if fits else name
        if key in new:
            raise CheckpointError(f'after renaming, two tensors would be called {key!r}')
        new[key] = tensor
    return OrderedDict(new)


def _mmengine_checkpoint(weights: Weights) -> dict:
    """Return the content of a checkpoint that a Runner resumes from at epoch 0."""
    average, raw = weights.average, weights.raw
    missing = sorted(set(average) ^ set(raw))
    if missing:
        raise CheckpointError(
            f'averaged and raw weights must have the same names, but {len(missing)} differ, such '
            f'as {missing[0]!r}; renaming may help'
        )
    ema = {'steps': torch.tensor(weights.steps), **{f'module.{k}': raw[k] for k in average}}
    return {
        'meta': {**weights.meta, 'epoch': 0, 'iter': 0},
        'state_dict': average,
        'ema_state_dict': OrderedDict({**ema, **weights.live}),
        'message_hub': {'log_scalars': {}, 'runtime_info': {}, 'resumed_keys': {}},
    }
