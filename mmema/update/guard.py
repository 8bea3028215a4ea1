"""Guard: a source tensor with NaN or infinity is left out of an update, and counted."""

from __future__ import annotations

from typing import Callable, Container, Dict, List, Tuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ..messages import listed, warn
from .blend_plan import BlendPlan
from .finite import are_finite, is_number
from .pairs import Pair, copy_all, sides

_MOST = 2**24  # numbers of a group: what an update needs beside average and source, three times


class SkipCounts:
    """How often each tensor was left out; counted where the tensor is, read only when asked."""

    def __init__(self) -> None:
        self._counts: Dict[Tuple[str, ...], Tensor] = {}
        self._logged: set = set()

    def add(self, names: Tuple[str, ...], skipped: Tensor) -> None:
        """Count the tensors of ``names`` for which ``skipped``, one bool for each, is True."""
        before = self._counts.get(names)
        self._counts[names] = skipped.long() if before is None else before + skipped

    def read(self) -> Dict[str, int]:
        """Return the counts above zero by name; waits for the device."""
        total: Dict[str, int] = {}
        for names, counts in self._counts.items():
            for name, count in zip(names, counts.tolist()):
                if count:
                    total[name] = total.get(name, 0) + count
        return total

    def log_new(self) -> None:
        """Log the names that were not logged before."""
        new = [name for name in self.read() if name not in self._logged]
        if new:
            self._logged.update(new)
            warn(
                f'not finite in the model, so left out of the average: {listed(new)}. The average '
                'goes on from the next update in which they are finite.'
            )


class Guard:
    """An update that leaves out tensors that are not finite, an option of a follower.

    In main memory the source is checked first, and where all is finite the follower blends as
    without a guard. On an accelerator, where a check would wait, the choice is made there.

    Args:
        blended: The pairs that the follower blends.
        copied: The pairs that it copies.
        masks: Names of copied tensors that may be infinite: they are not checked.
        names: All names of tensors; on some ranks a pair may be missing here, or empty.
        skip_counts: Where to count.
        reduced: As of a view: a tensor is left out on all ranks if it is on one, by one small
            reduction for each update.
    """

    def __init__(
        self,
        blended: List[Pair],
        copied: List[Pair],
        masks: Container[str],
        names: List[str],
        skip_counts: SkipCounts,
        reduced: Callable | None = None,
    ):
        self._reduced = reduced
        self._skip_counts = skip_counts
        checked = [p for p in copied if _can_be_non_finite(p) and p.name not in masks]
        unchecked = {p.name for p in copied} - {p.name for p in checked}
        self._groups = _groups(blended, True) + _groups(checked, False)
        self._places = {name: place for place, name in enumerate(names)}
        self._exact = BlendPlan([p for p in copied if p.name in unchecked])
        self._in_main_memory = all(group.device.type == 'cpu' for group in self._groups)

    def update(self, momentum: float | None) -> bool:
        """Update all pairs as a follower does; return False, with nothing done, if all are finite.

        An accelerator is not asked whether all are: there the update is always made here.
        """
        # A tensor that this update does not blend is not left out of it.
        groups = [g for g in self._groups if momentum is not None or not g.is_blended]
        checks = [are_finite(group.sources) for group in groups]
        if self._reduced is not None:
            checks = self._agreed(groups, checks)
        if self._in_main_memory and all(bool(finite.all()) for finite in checks):
            return False
        for group, finite in zip(groups, checks):
            self._skip_counts.add(group.names, ~finite)
            group.update(momentum if group.is_blended else 1.0, finite)
        self._exact.copy()
        if self._in_main_memory:
            self._skip_counts.log_new()
        return True

    def _agreed(self, groups: List[_Group], checks: List[Tensor]) -> List[Tensor]:
        """Return the checks of all ranks together; a tensor is finite if all its parts are."""
        device = checks[0].device if checks else None
        finite = torch.ones(len(self._places), dtype=torch.uint8, device=device)
        rows = [torch.tensor([self._places[name] for name in group.names]) for group in groups]
        rows = [row.to(finite.device) for row in rows]
        for row, check in zip(rows, checks):
            finite[row] = check.to(finite)
        finite = self._reduced(finite, 'MIN')
        return [finite[row].to(check) for row, check in zip(rows, checks)]


class _Group:
    """Pairs of one dtype and device on either side, which are updated together."""

    def __init__(self, pairs: List[Pair], is_blended: bool):
        self.names = tuple(pair.name for pair in pairs)
        self.averages, self.sources = sides(pairs)
        self.is_blended = is_blended
        self.device = self.sources[0].device
        sizes = [average.numel() for average in self.averages]
        self.total = sum(sizes)
        self.sizes = torch.tensor(sizes, device=self.averages[0].device)

    def update(self, momentum: float, finite: Tensor) -> None:
        own = _flatten_dense_tensors(self.averages)
        new = _flatten_dense_tensors(self.sources).to(own.device, own.dtype)
        taken = torch.repeat_interleave(finite.to(own.device), self.sizes, output_size=self.total)
        if momentum != 1:
            new = own.lerp(new, momentum)
        # A choice, not a weight of zero: times zero a NaN stays one, and blended with itself an
        # infinity becomes one.
        taken_in = _unflatten_dense_tensors(torch.where(taken, new, own), self.averages)
        copy_all(self.averages, taken_in)


def _groups(pairs: List[Pair], are_blended: bool) -> List[_Group]:
    by_kind: Dict[tuple, List[List[Pair]]] = {}
    for pair in filter(_can_be_non_finite, pairs):
        kind = tuple((tensor.dtype, tensor.device) for tensor in (pair.average, pair.source))
        lists = by_kind.setdefault(kind, [[]])
        if lists[-1] and sum(p.average.numel() for p in lists[-1]) + pair.average.numel() > _MOST:
            lists.append([])
        lists[-1].append(pair)
    return [_Group(group, are_blended) for lists in by_kind.values() for group in lists]


def _can_be_non_finite(pair: Pair) -> bool:
    return is_number(pair.source) and pair.source.numel() > 0 and pair.average.element_size() > 1
