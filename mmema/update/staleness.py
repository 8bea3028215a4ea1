"""Staleness check: whether an average and its source still hold the tensors that were paired.

It runs before every update: a stale tensor would be averaged for the rest of the run, and nothing
would show it.
"""

from __future__ import annotations

from gc import get_referents
from operator import attrgetter, is_
from typing import Callable, List

from torch import Tensor, nn

from .pairs import Pair, sides


class Snapshot:
    """The objects in all modules of a model.

    Re-assigned buffers, a new ``nn.Parameter``, ``load_state_dict(assign=True)`` and a replaced
    submodule all change the identity of an object in one of the dicts. The objects are kept here:
    a new one could have the address of one that is gone, and pass for it.
    """

    def __init__(self, model: nn.Module):
        dicts = [d for m in model.modules() for d in (m._parameters, m._buffers, m._modules)]
        self.filled = [d for d in dicts if d]
        self.objects = get_referents(*self.filled)
        self.empty = [d for d in dicts if not d]  # which may get a tensor

    def holds(self) -> bool:
        # The referents of a dict are its values: one call for all dicts takes a third of the time
        # of a loop over them.
        now = get_referents(*self.filled)
        return (
            len(now) == len(self.objects)
            and all(map(is_, now, self.objects))
            and not any(self.empty)
        )


class Unchanged:
    """The value of a function for each of some tensors."""

    def __init__(self, function: Callable[[Tensor], object], tensors: List[Tensor]):
        self.function = function
        self.tensors = tensors
        self.values = [*map(function, tensors)]

    def holds(self) -> bool:
        return [*map(self.function, self.tensors)] == self.values


class StalenessCheck:
    """Whether an average has the same tensors as when it was paired, and all pairs still match.

    A tensor can be converted or re-pointed through ``.data`` and stay the same object. A memory
    address would not do: freed memory is used again.

    Args:
        average: The average. The objects of the source are checked by its view.
        pairs: All pairs, blended or copied.
    """

    def __init__(self, average: nn.Module, pairs: List[Pair]):
        averages, sources = sides(pairs)
        both = averages + sources
        self.checks = [
            Snapshot(average),
            Unchanged(Tensor.numel, both),
            Unchanged(attrgetter('dtype'), both),
            Unchanged(Tensor.get_device, both),
        ]

    def holds(self) -> bool:
        return all(check.holds() for check in self.checks)
