"""Staleness check: whether an average and its source still hold the tensors that were paired.

It runs before every update: a stale tensor would be averaged for the rest of the run, and nothing
would show it.
"""

from __future__ import annotations

from gc import get_referents
from operator import attrgetter, is_
from typing import Callable, List

from torch import Tensor, nn


def _dicts_of(model: nn.Module) -> List[dict]:
    return [d for m in model.modules() for d in (m._parameters, m._buffers, m._modules)]


class Snapshot:
    """The objects in the modules of two models.

    Re-assigned buffers, a new ``nn.Parameter``, ``load_state_dict(assign=True)`` and a replaced
    submodule all change the identity of an object in one of the dicts.
    """

    def __init__(self, average: nn.Module, source: nn.Module):
        of_source = _dicts_of(source)
        self.filled = [d for d in of_source + _dicts_of(average) if d]
        self.objects = get_referents(*self.filled)
        # Where the source may get a tensor more. One more in the average has nothing to follow.
        self.empty = [d for d in of_source if not d]

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
    """Staleness check in Python: identities, and the properties that tensors keep while paired.

    A tensor can be converted or re-pointed through ``.data`` and stay the same object. A memory
    address would not do: freed memory is used again.
    """

    def __init__(self, snapshot: Snapshot, averages: List[Tensor], sources: List[Tensor]):
        both = averages + sources
        self.checks = [
            snapshot,
            Unchanged(Tensor.numel, both),
            Unchanged(attrgetter('dtype'), both),
            Unchanged(Tensor.get_device, both),
            Unchanged(attrgetter('requires_grad'), sources),
        ]

    def holds(self) -> bool:
        return all(check.holds() for check in self.checks)
