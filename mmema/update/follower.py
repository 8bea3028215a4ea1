"""Follower: the one object through which an average takes in a source.

It ``holds(average, source)`` while it is of these two models and none of its tensors is stale. It
can ``update(momentum)``: blend (1: copy; None: leave the blended tensors alone) and copy the rest.
It can ``finish()`` an update that is still on its way. A new kind of source is a new class with
these three methods, and a line in :func:`follow`.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from .direct import DirectFollower
from .guarded import GuardedFollower, SkipCounts
from .refusals import refuse_pieces
from .selection import Selection
from .sharded import Parts, ShardedFollower, is_sharded
from .staging import StagedFollower, is_far


def follow(
    average: nn.Module,
    source: nn.Module,
    selection: Selection,
    skip_counts: SkipCounts | None = None,
) -> DirectFollower | StagedFollower | ShardedFollower:
    """Return a follower for an average and a source; with ``skip_counts``, a guarded one.

    Raises:
        ValueError: If the two do not have the same tensors, by name and shape.
        RunError: If the source is sharded by FSDP1 or ZeRO-3.
    """
    refuse_pieces(source)
    if is_sharded(source):
        return ShardedFollower(average, source, selection, partial(follow, skip_counts=skip_counts))
    direct = DirectFollower
    if skip_counts is not None:
        reduced = source.reduced if isinstance(source, Parts) else None
        direct = partial(GuardedFollower, skip_counts=skip_counts, reduced=reduced)
    if is_far(average, source):
        return StagedFollower(average, source, selection, direct)
    return direct(average, source, selection)
