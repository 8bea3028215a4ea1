"""What the record of an average in a file tells: each momentum, its iteration, what was copied."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..checkpoints.formats import CheckpointError
from ..record import Record, blends_by_rule
from .facts import FileFacts


class History(NamedTuple):
    """All updates of an average until a file, in the order of time."""

    momenta: np.ndarray  # 1 for a copy, 0 for an update that `interval` skips
    at: np.ndarray  # the iterations, from 0, at whose ends they were made


class Passed(NamedTuple):
    """What happened to an average between two files."""

    updates: int
    kept: float  # share of the earlier average in the later one


def history_in(record: Record, file: FileFacts, name: str) -> History:
    """Return all updates of an average; raise CheckpointError where they are not all known."""
    if record.skipped:
        raise CheckpointError(
            f'{name} in {file} left out {record.skipped} tensors that were not finite '
            '(skip_non_finite), so its tensors are not averages of the same updates'
        )
    try:
        momenta = record.momenta()
    except ValueError as error:
        raise CheckpointError(f'{name} in {file}: {error}') from None
    if record.last_copy < 0 or np.isnan(momenta[record.last_copy :]).any():
        raise CheckpointError(
            f'{file} does not say what {name} was made of at first: the run took it over from a '
            'file without a record'
        )
    at = record.iterations_of_updates()
    if (at < 0).all() and len(at) == file.iteration - file.run.begin:
        at = file.run.begin + np.arange(len(at))  # MMEngine's hook updates at every iteration
    if (at[record.last_copy :] < 0).any():
        raise CheckpointError(f'{file} does not say at which iterations {name} was updated')
    known = at >= 0
    return History(np.nan_to_num(momenta[known]), at[known])


def passed_between(before: Record, after: Record, files: tuple, name: str) -> Passed:
    """Return what happened to an average between two files; raise CheckpointError if unknown."""
    one, other = files
    if not after.begins_with(before):
        raise CheckpointError(
            f'{name} in {other} was not made from that in {one}: it went back to an earlier '
            'checkpoint, or the two are of different runs'
        )
    if after.skipped != before.skipped:
        raise CheckpointError(
            f'between {one} and {other} {name} left out {after.skipped - before.skipped} tensors '
            'that were not finite (skip_non_finite), so no share holds for all of them'
        )
    kept = after.share_of(before)
    selections = after.selections_since(before.updates)
    if kept and len(selections) > 1:
        raise CheckpointError(
            f'between {one} and {other} the tensors that {name} blends have changed: '
            'update_buffers and exclude must stay as they are'
        )
    return Passed(after.updates - before.updates, kept)


def copied_by(record: Record, names: list[str], configured: tuple) -> tuple[bool, frozenset]:
    """Return whether an average blends buffers, and which floating-point tensors it copies.

    Args:
        record: Its record; what it blends must not have changed since its last copy.
        names: Of all floating-point tensors.
        configured: update_buffers and exclude in the config, for an average of copies alone.
    """
    update_buffers, exclude = (record.selections_since(0) or [configured])[-1]
    copied = {n for n in names if not blends_by_rule(n, update_buffers, exclude)}
    return update_buffers, frozenset(copied.union(record.copied))
