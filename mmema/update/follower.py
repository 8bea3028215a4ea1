"""Follower: an average and a view of its source, paired tensor by tensor, and the update of all.

A new kind of source is a new view, and a line in `follow`.
"""

from __future__ import annotations

from typing import Dict, List, Tuple

import torch
from torch import Tensor, nn

from .blend_plan import BlendPlan
from .guard import Guard, SkipCounts
from .pairs import Pair, canonical_name, memory_of, named_tensors, pairs_of
from .refusals import refuse_pieces
from .selection import Selected, Selection
from .sharded import PartsView, is_sharded
from .staging import is_far, staged
from .staleness import StalenessCheck
from .views import LocalView, View


def follow(
    average: nn.Module,
    source: nn.Module,
    selection: Selection,
    skip_counts: SkipCounts | None = None,
) -> Follower:
    """Return a follower for an average and a source; with ``skip_counts``, a guarded one.

    Raises:
        ValueError: If the two do not have the same tensors, by name and shape.
        RunError: If the source is sharded by FSDP1 or ZeRO-3.
    """
    refuse_pieces(source)
    view = PartsView(source) if is_sharded(source) else LocalView(source)
    selected = selection.of(view)
    if is_far(average, view.module):
        view = staged(view, selected.blended)
    return Follower(average, view, selected, skip_counts)


class Follower:
    """An average that takes in a source, as long as it ``holds`` the tensors of both.

    ``copied`` has the names of floating-point tensors that are never blended.

    From a late view an update only fetches the tensors; `finish` blends them.
    """

    def __init__(
        self,
        average: nn.Module,
        view: View,
        selected: Selected,
        skip_counts: SkipCounts | None = None,
    ):
        self.average = average
        self.view = view
        self._selected = selected
        self._skip_counts = skip_counts
        self._fetched: list = []  # the momentum of the update that is to be finished, if one is
        self._average_changed = False
        self._pair()

    def _pair(self) -> None:
        average, source = self.average, self.view.module
        named = [*pairs_of(average, source)]
        pairs, self._aliases = _without_aliases([pair for pair, _ in named])
        ids = {id(t) for name, t, _ in named_tensors(source) if name in self._selected.blended}
        blended = [pair for pair in pairs if id(pair.source) in ids]
        copied = [pair for pair in pairs if id(pair.source) not in ids]
        self.copied = [
            name
            for name, tensor, _ in named_tensors(source)
            if tensor.is_floating_point() and id(tensor) not in ids
        ]
        self._check = StalenessCheck(average, pairs)
        self._blended, self._copied = BlendPlan(blended), BlendPlan(copied)
        self._guard = None
        if self._skip_counts is not None:
            names = [pair.name for pair, _ in named]
            masks = {canonical_name(name) for name in self._selected.masks}
            self._guard = Guard(blended, copied, masks, names, self._skip_counts, self.view.reduced)

    def holds(self, average: nn.Module, source: nn.Module) -> bool:
        """Return whether this is the follower of these two, and none of their tensors is stale."""
        return (
            average is self.average
            and source is self.view.source
            and not self._average_changed
            and self.view.holds()
            and self._pairs_hold()
        )

    def _pairs_hold(self) -> bool:
        return self._check.holds() and all(memory_of(a) == memory_of(b) for a, b in self._aliases)

    def update(self, momentum: float | None) -> None:
        """Blend (1: copy; None: leave the blended tensors alone), and copy all other tensors."""
        if self.view.is_late:
            self.view.fetch(self, with_blended=momentum is not None)
            self._fetched.append(momentum)
        else:
            self._take_in(momentum)

    @torch.no_grad()
    def finish(self) -> None:
        """Complete the update that has only been fetched, if there is one."""
        if not self._fetched:
            return
        self.view.wait()  # where Ctrl-C arrives: nothing has changed yet
        momentum = self._fetched.pop()
        if not self._pairs_hold():  # the average was converted, say
            self._average_changed = True
            self._pair()
        self._take_in(momentum)

    def _take_in(self, momentum: float | None) -> None:
        if self._guard is not None and self._guard.update(momentum):
            return
        if momentum == 1:
            self._blended.copy()
        elif momentum is not None:
            self._blended.lerp(momentum)
        self._copied.copy()


def _without_aliases(pairs: List[Pair]) -> Tuple[List[Pair], List[Tuple[Tensor, Tensor]]]:
    """Return pairs that differ in memory, and the tensors that share theirs with one of them.

    After ``load_state_dict(assign=True)`` tied tensors are two objects in one memory, which would
    be blended twice.
    """
    kept: Dict[tuple, Pair] = {}
    aliases = []
    for pair in pairs:
        key = memory_of(pair.average), memory_of(pair.source)
        first = kept.setdefault(key, pair)
        if first is not pair:
            aliases += [(first.average, pair.average), (first.source, pair.source)]
    return [*kept.values()], aliases
