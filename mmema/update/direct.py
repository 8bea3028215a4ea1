"""All tensors of an average and a source, paired once and blended at every update."""

from __future__ import annotations

from gc import get_referents
from operator import attrgetter, is_
from typing import Callable, Dict, List, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from . import native
from .pairs import Pair, copy_all, is_small_vector, pairs_of, sides

_RUN = 2**15 - 1  # elements up to which torch.cat is one loop; beyond, an operator for each tensor


class Snapshot:
    """The objects in two module trees, to see at once whether they are still the same.

    Anything that puts another tensor in a place of a tree (re-assigned buffers, a new
    ``nn.Parameter``, ``load_state_dict(assign=True)``, a replaced submodule) changes an identity in
    one of its dicts.
    """

    def __init__(self, average: nn.Module, source: nn.Module):
        of_source = _dicts_of(source)
        self.filled = [d for d in of_source + _dicts_of(average) if d]
        self.objects = get_referents(*self.filled)
        # Where the source may get a tensor more. One more in the average has nothing to follow.
        self.empty = [d for d in of_source if not d]

    def holds(self) -> bool:
        # What a dict refers to are its values: one call for all dicts, where a loop over them takes
        # three times as long.
        now = get_referents(*self.filled)
        return (
            len(now) == len(self.objects)
            and all(map(is_, now, self.objects))
            and not any(self.empty)
        )


def _dicts_of(model: nn.Module) -> List[dict]:
    return [d for m in model.modules() for d in (m._parameters, m._buffers, m._modules)]


class Check:
    """What a function says of some tensors, to see at once whether it still says the same."""

    def __init__(self, function: Callable[[Tensor], object], tensors: List[Tensor]):
        self.function = function
        self.tensors = tensors
        self.answers = [*map(function, tensors)]

    def holds(self) -> bool:
        return [*map(self.function, self.tensors)] == self.answers


class Pairing:
    """All pairs of an average and a source, sorted by what happens to them; valid while it holds.

    Args:
        average: The averaged copy.
        source: The model being trained.
        is_blended: Tells from a pair, and whether it is a buffer, if it is blended; the others are
            copied at each update.
    """

    def __init__(
        self, average: nn.Module, source: nn.Module, is_blended: Callable[[Pair, bool], bool]
    ):
        self.average = average
        self.source = source
        self.trees = Snapshot(average, source)
        self.blended: List[Pair] = []
        self.copied: List[Pair] = []
        parameters = []
        for pair, is_buffer in pairs_of(average, source):
            (self.blended if is_blended(pair, is_buffer) else self.copied).append(pair)
            if not is_buffer:
                parameters.append(pair.source)
        dicts = self.trees.filled + self.trees.empty
        # Those of a TorchScript module are none.
        compiled = native.compiled if all(isinstance(d, dict) for d in dicts) else None
        self.blending = _sorted(self.blended, compiled)
        self.copying = _sorted(self.copied, compiled)
        if compiled is None:
            self.watches = [self.trees, *self._checks(parameters)]
        else:
            self.watches = [compiled.Watch(dicts, *sides(self.blended + self.copied))]

    def _checks(self, parameters: List[Tensor]) -> List[Check]:
        """All that can change while a tensor stays itself and would lead an operator astray."""
        pairs = self.blended + self.copied
        blended = [pair.source for pair in self.blended]
        gathered = [source for run in self.copying.runs for source in run.sources]
        return [
            # What is converted or re-assigned through .data moves; a run keeps its old memory, so
            # nothing else gets that address.
            Check(Tensor.data_ptr, [pair.average for pair in pairs]),
            Check(Tensor.numel, [pair.source for pair in pairs]),
            # Copying converts, only gathering needs one device.
            Check(Tensor.get_device, blended + gathered),
            Check(attrgetter('dtype'), blended),
            Check(attrgetter('requires_grad'), parameters),
        ]

    def holds(self, average: nn.Module, source: nn.Module) -> bool:
        return (
            average is self.average
            and source is self.source
            and all(watch.holds() for watch in self.watches)
        )

    def blend(self, momentum: float) -> None:
        """``avg <- (1 - momentum) avg + momentum src`` for every blended pair."""
        self.blending.blend(momentum)

    def copy(self) -> None:
        """Copy the copied pairs."""
        self.copying.copy()

    def copy_blended(self) -> None:
        """Copy the blended pairs, as the first update after a hard restart does."""
        self.blending.copy()


class Sorted(NamedTuple):
    """Pairs by the fastest way there is for them."""

    rows: list  # of the compiled part
    runs: List[Run]
    like: List[Tuple[List[Tensor], List[Tensor]]]  # averages and sources of one fused call each
    unlike: List[Pair]

    def blend(self, momentum: float) -> None:
        for rows in self.rows:
            rows.lerp(momentum)
        for run in self.runs:
            run.average.lerp_(torch.cat(run.sources, out=run.gathered), momentum)
        for averages, sources in self.like:
            torch._foreach_lerp_(averages, sources, momentum)
        for pair in self.unlike:
            average = pair.average
            average.lerp_(pair.source.to(average.device, average.dtype), momentum)

    def copy(self) -> None:
        for rows in self.rows:
            rows.copy()
        for run in self.runs:
            torch.cat(run.sources, out=run.average)
        for averages, sources in self.like:
            copy_all(averages, sources)
        for pair in self.unlike:
            pair.average.copy_(pair.source)


def _sorted(pairs: List[Pair], compiled) -> Sorted:
    rows, pairs = _sort_out_rows(pairs, compiled)
    runs, pairs = _sort_out_runs(pairs)
    return Sorted(rows, runs, *_sort_by_likeness(pairs))


def _sort_out_rows(pairs: List[Pair], compiled) -> Tuple[list, List[Pair]]:
    """Return what the compiled part takes, by dtype, and the other pairs."""
    if not hasattr(compiled, 'Rows'):
        return [], pairs
    rows: Dict[torch.dtype, List[Pair]] = {}
    others = []
    for pair in pairs:
        (rows.setdefault(pair.average.dtype, []) if _is_row(pair) else others).append(pair)
    return [compiled.Rows(*sides(group)) for group in rows.values()], others


def _is_row(pair: Pair) -> bool:
    """Tell whether both are what they seem: plain numbers in a row in main memory."""
    return pair.average.dtype == pair.source.dtype and all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == 'cpu'
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and not (tensor.is_complex() or tensor.is_neg() or tensor.is_quantized)
        and not tensor._is_zerotensor()
        for tensor in (pair.average, pair.source)
    )


class Run(NamedTuple):
    """Vectors of the average that lie end to end, as one tensor, and the sources they follow."""

    average: Tensor
    sources: List[Tensor]
    gathered: Tensor


def _sort_out_runs(pairs: List[Pair]) -> Tuple[List[Run], List[Pair]]:
    """Return the runs among the pairs, and the pairs that are in none."""
    runs: List[List[Pair]] = []
    single = []
    end, size = None, 0
    for pair in sorted(pairs, key=lambda pair: pair.average.data_ptr()):
        average, source = pair.average, pair.source
        kind = (average.dtype, average.device)
        if (
            not is_small_vector(average)
            or not average.is_contiguous()
            or kind != (source.dtype, source.device)
        ):
            single.append(pair)
            continue
        start = (average.dtype, average.untyped_storage().data_ptr(), average.data_ptr())
        if start != end or size + average.numel() > _RUN:
            runs.append([])
            size = 0
        runs[-1].append(pair)
        size += average.numel()
        end = (*start[:2], start[2] + average.numel() * average.element_size())
    return [_run_of(run) for run in runs], single


def _run_of(pairs: List[Pair]) -> Run:
    first = pairs[0].average.detach()
    size = sum(pair.average.numel() for pair in pairs)
    return Run(
        first.as_strided((size,), (1,)),
        [pair.source for pair in pairs],
        torch.empty(size, dtype=first.dtype, device=first.device),
    )


def _sort_by_likeness(pairs: List[Pair]):
    """Return lists for one fused call each, and the pairs that need a conversion.

    A fused kernel takes a list only if all of it has one dtype, one device and, pair by pair, one
    memory layout.
    """
    groups: Dict[tuple, Tuple[List[Tensor], List[Tensor]]] = {}
    unlike = []
    for pair in pairs:
        average, source = pair.average, pair.source
        if (average.dtype, average.device) != (source.dtype, source.device):
            unlike.append(pair)
            continue
        key = (average.dtype, average.device, average.stride() == source.stride())
        averages, sources = groups.setdefault(key, ([], []))
        averages.append(average)
        sources.append(source)
    return list(groups.values()), unlike
