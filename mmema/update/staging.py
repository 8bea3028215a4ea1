"""Staging: a source on a GPU reaches an average in main memory through pinned memory."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Dict, FrozenSet, Iterator, List, NamedTuple
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn

from .pairs import named_tensors, pairs_of
from .staleness import Unchanged
from .views import View

_SMALL = 2**12  # numbers up to which tensors are copied together


def is_far(average: nn.Module, source: nn.Module) -> bool:
    """Return whether an average in main memory follows a source on a GPU."""
    return any(
        pair.average.device.type == 'cpu' and pair.source.is_cuda
        for pair, _ in pairs_of(average, source)
    )


class StagedView(View):
    """View of a copy in pinned memory of what another view has, one update late.

    `fetch` puts copies into the stream of the GPU: they read the weights as they are at that
    point, whatever training makes of them next. The program need not wait for them until it fetches
    again, or reads the average.
    """

    is_late = True

    def __init__(self, below: View, names: FrozenSet[str]):
        named = [*named_tensors(below.module)]
        tensors = [*{id(t): t for _, t, _ in named}.values()]
        blended = {id(t) for name, t, _ in named if name in names}
        self.source = below.source
        self.reduced = below.reduced
        self._below = below
        self._kinds = Unchanged(_kind, tensors)
        self._transfers = _transfers_of(tensors, blended)
        self.module = _staged_copy(below.module, self._transfers)
        self._devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        self._arrivals: list = []
        self._unfinished: WeakSet = WeakSet()  # followers that have fetched and not blended yet
        self._round = None
        self._sent: set = set()  # kinds of transfers that this round has sent

    def holds(self) -> bool:
        return self._below.holds() and self._kinds.holds()

    def fetch(self, follower, with_blended: bool) -> None:
        """Send the source on its way, unless the round has; blended tensors only if wanted."""
        if _round is None or _round is not self._round:
            for unfinished in list(self._unfinished):
                unfinished.finish()  # before its numbers are written over
            self._unfinished.clear()
            self._round, self._sent = _round, set()
        self._unfinished.add(follower)
        wanted = {False, with_blended} - self._sent
        for transfer in self._transfers:
            if transfer.is_blended in wanted:
                transfer.send()
        self._sent |= wanted
        self._arrivals = [torch.cuda.current_stream(d).record_event() for d in self._devices]

    def wait(self) -> None:
        for arrival in self._arrivals:
            arrival.synchronize()


_round = None
_shared: WeakValueDictionary = WeakValueDictionary()  # views by source and blended tensors


@contextmanager
def staged_once() -> Iterator[None]:
    """Stage a source once for all averages updated inside, where it must not change."""
    global _round
    _round = object()
    try:
        yield
    finally:
        _round = None


def staged(below: View, names: FrozenSet[str]) -> StagedView:
    """Return a staged view that stands on another one; inside ``staged_once`` a shared one.

    ``names`` are those of the blended tensors.
    """
    if _round is None:
        return StagedView(below, names)
    view = _shared.get((id(below.source), names))
    if view is None or not view.holds():
        view = _shared[id(below.source), names] = StagedView(below, names)
    return view


class Transfer(NamedTuple):
    """Source tensors that are copied together, and the pinned memory that they go to."""

    sources: List[Tensor]
    target: Tensor
    is_blended: bool

    def send(self) -> None:
        first = self.sources[0]
        if len(self.sources) > 1:
            first = torch.stack(self.sources) if first.dim() == 0 else torch.cat(self.sources)
        self.target.copy_(first, non_blocking=True)


def _kind(tensor: Tensor) -> tuple:
    # With other strides than its target's a source goes through memory that is not pinned.
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _transfers_of(tensors: List[Tensor], blended: set) -> List[Transfer]:
    """Return transfers: large tensors alone, small ones with those of their kind."""
    together: Dict[tuple, List[Tensor]] = {}
    for tensor in tensors:
        small = tensor.dim() < 2 and 0 < tensor.numel() <= _SMALL
        kind = (tensor.device, tensor.dtype, tensor.dim()) if small else id(tensor)
        together.setdefault((kind, id(tensor) in blended), []).append(tensor)
    return [
        Transfer(group, _pinned_memory_for(group), is_blended)
        for (_, is_blended), group in together.items()
    ]


def _pinned_memory_for(tensors: List[Tensor]) -> Tensor:
    first = tensors[0].detach()
    pinned = {'device': 'cpu', 'pin_memory': first.is_cuda}
    if len(tensors) == 1:
        return torch.empty_like(first, **pinned)  # in the layout of the source
    return torch.empty(sum(t.numel() for t in tensors), dtype=first.dtype, **pinned)


def _staged_copy(source: nn.Module, transfers: List[Transfer]) -> nn.Module:
    """Return a bare module with the names of the source and the memory of the transfers."""
    staged: Dict[int, Tensor] = {}
    for sources, target, _ in transfers:
        parts = [target]
        if len(sources) > 1:
            split = target.split([tensor.numel() for tensor in sources])
            parts = [part.view(tensor.shape) for part, tensor in zip(split, sources)]
        for tensor, part in zip(sources, parts):
            is_parameter = isinstance(tensor, nn.Parameter)
            staged[id(tensor)] = nn.Parameter(part, tensor.requires_grad) if is_parameter else part
    root = nn.Module()
    for name, tensor, is_buffer in named_tensors(source):
        *path, leaf = name.split('.')
        owner = root
        for part in path:
            owner = owner._modules.setdefault(part, nn.Module())
        (owner._buffers if is_buffer else owner._parameters)[leaf] = staged[id(tensor)]
    return root
