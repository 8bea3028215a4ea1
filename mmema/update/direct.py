"""Direct follower: torch's operators reach average and source where they are."""

from __future__ import annotations

from typing import Dict, List, Tuple

from torch import Tensor, nn

from . import native
from .blend_plan import BlendPlan
from .pairs import Pair, memory_of, pairs_of, sides
from .selection import Selection
from .staleness import Snapshot, StalenessCheck


class DirectFollower:
    """An average that takes in a source by operators on both, at once."""

    def __init__(self, average: nn.Module, source: nn.Module, selection: Selection):
        self.average = average
        self.source = source
        pairs, self._aliases = _without_aliases([pair for pair, _ in pairs_of(average, source)])
        blended = selection.blended_in(source)
        self.blended = [pair for pair in pairs if id(pair.source) in blended]
        self.copied = [pair for pair in pairs if id(pair.source) not in blended]
        # Compiled code has bare pointers to the dicts and the objects in them. The snapshot keeps
        # both: the address of a layer that is gone would soon be that of another one.
        snapshot = self._snapshot = Snapshot(average, source)
        dicts = snapshot.filled + snapshot.empty
        # The modules of TorchScript have none.
        compiled = native.compiled if all(isinstance(d, dict) for d in dicts) else None
        if compiled is None:
            if native.compiled is None:
                native.say_how_to_compile()
            self._check = StalenessCheck(snapshot, *sides(pairs))
        else:
            self._check = compiled.StalenessCheck(dicts, *sides(pairs))
        self._blended = BlendPlan(self.blended, compiled)
        self._copied = BlendPlan(self.copied, compiled)

    def holds(self, average: nn.Module, source: nn.Module) -> bool:
        return (
            average is self.average
            and source is self.source
            and self._check.holds()
            and all(memory_of(one) == memory_of(other) for one, other in self._aliases)
        )

    def update(self, momentum: float | None) -> None:
        if momentum == 1:
            self._blended.copy()
        elif momentum is not None:
            self._blended.lerp(momentum)
        self._copied.copy()

    def finish(self) -> None:
        pass  # an update is complete when it returns


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
