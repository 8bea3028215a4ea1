"""Conversion of another training code's checkpoint to one that an MMEngine run resumes from."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch

from ..messages import listed
from .export import compact
from .files import load, write_whole
from .formats import CheckpointError


def convert(
    path: str | Path,
    out: str | Path,
    steps: int | None = None,
    force: bool = False,
    trust: bool = False,
) -> list[str]:
    """Write the average, the raw weights and the counter as a checkpoint of an MMEngine run.

    A Runner resumes from it at epoch 0 with ``resume=True``, with a new optimizer. The counter is
    the same number in all codes: ``steps``, ``updates``, ``n_averaged``. The live values of mmema's
    restartable averages are kept; no other code saves its decay.

    Args:
        path: The checkpoint; see :func:`mmema.checkpoints.files.load`.
        out: The new file, ``.pth`` or ``.pt``.
        steps: The number of updates, where the file does not say. Defaults to None.
        force: Whether an existing file may be replaced. Defaults to False.
        trust: Whether the file may hold any object; see :func:`mmema.checkpoints.files.load`.

    Returns:
        Assumptions, a line each.

    Raises:
        CheckpointError: If the file cannot be read or converted, or the new one not be written.
    """
    found = load(path, trust)
    steps, notes = found.steps if steps is None else steps, found.notes
    if steps is None:
        raise CheckpointError(
            f'{path} does not say how many updates its average has had, and the warm-up of the '
            'schedule goes on from there: give steps (--steps N), in most codes the iterations'
        )
    if steps < 0:
        raise CheckpointError(f'steps must be at least 0, got {steps}')
    average, raw = found.average, found.raw
    if found.also:
        notes.append(f'left out, since they are not the main average: {listed(found.also)}')
    if average is None:
        average = raw
        notes.append('no EMA weights in the file: the average is a copy of the raw weights')
    if raw is None:
        raw = average
        notes.append('no raw weights in the file: training goes on from the average')
    different = sorted(set(average) ^ set(raw))
    if different:
        raise CheckpointError(
            f'averaged and raw weights in {path} must have the same names, but {len(different)} '
            f'differ, such as {different[0]!r}'
        )
    average, raw = compact(average), compact(raw)
    ema = {'steps': torch.tensor(steps), **{f'module.{name}': raw[name] for name in average}}
    content = {
        'meta': {**found.meta, 'epoch': 0, 'iter': 0},
        'state_dict': average,
        'ema_state_dict': OrderedDict({**ema, **found.live}),
        'message_hub': {'log_scalars': {}, 'runtime_info': {}, 'resumed_keys': {}},
    }
    write_whole(Path(out), lambda file: torch.save(content, file), ('.pth', '.pt'), force)
    return notes
