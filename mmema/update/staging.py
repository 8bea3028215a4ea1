"""Staged follower: a source on a GPU reaches an average in main memory through pinned memory."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Callable, Dict, Iterator, List, NamedTuple
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn

from .pairs import named_tensors, pairs_of
from .selection import Selection
from .staleness import Snapshot, Unchanged

_SMALL = 2**12  # numbers up to which tensors are copied together


def is_far(average: nn.Module, source: nn.Module) -> bool:
    """Return whether an average in main memory follows a source on a GPU."""
    return any(
        pair.average.device.type == 'cpu' and pair.source.is_cuda
        for pair, _ in pairs_of(average, source)
    )


class StagedFollower:
    """An average that takes in a source one update late, so that the program need not wait.

    :meth:`update` puts copies into the stream of the GPU: they read the weights as they are at that
    point, whatever training makes of them next. :meth:`finish` waits until they have arrived, and
    blends.
    ``follow_staged`` makes the follower of the average and the staged copy.
    """

    def __init__(
        self,
        average: nn.Module,
        source: nn.Module,
        selection: Selection,
        follow_staged: Callable,
    ):
        self.average = average
        self.source = source
        self._follow_staged = lambda staged: follow_staged(average, staged, selection)
        self.stage = _stage_for(source, selection.blended_in(source))
        self.stage.followers.add(self)
        self._inner = self._follow_staged(self.stage.copy)
        self._pending: list = []  # the momentum of the update that is on its way, if one is
        self._average_changed = False

    def holds(self, average: nn.Module, source: nn.Module) -> bool:
        return (
            average is self.average
            and source is self.source
            and not self._average_changed
            and self.stage.holds()
        )

    def update(self, momentum: float | None) -> None:
        self.stage.send(with_blended=momentum is not None)
        self._pending.append(momentum)

    @torch.no_grad()
    def finish(self) -> None:
        if not self._pending:
            return
        self.stage.wait()  # where Ctrl-C arrives: nothing has changed yet
        momentum = self._pending.pop()
        if not self._inner.holds(self.average, self.stage.copy):  # the average was converted, say
            self._average_changed = True
            self._inner = self._follow_staged(self.stage.copy)
        self._inner.update(momentum)


class Stage:
    """A copy of a source in pinned memory, and the transfers that fill it."""

    def __init__(self, source: nn.Module, blended: set):
        tensors = [*{id(t): t for _, t, _ in named_tensors(source)}.values()]
        self.followers: WeakSet = WeakSet()
        self._transfers = _transfers_of(tensors, blended)
        self.copy = _staged_copy(source, self._transfers)
        self._snapshot = Snapshot(self.copy, source)
        self._kinds = Unchanged(_kind, tensors)
        self._devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        self._arrivals: list = []
        self._round = None
        self._sent: set = set()  # kinds of transfers that this round has sent

    def holds(self) -> bool:
        """Return whether none of the tensors is stale."""
        return self._snapshot.holds() and self._kinds.holds()

    def send(self, with_blended: bool) -> None:
        """Send the source on its way, unless the round has; blended tensors only if wanted."""
        if _round is None or _round is not self._round:
            for follower in list(self.followers):
                follower.finish()  # before its numbers are written over
            self._round, self._sent = _round, set()
        wanted = {False, with_blended} - self._sent
        for transfer in self._transfers:
            if transfer.is_blended in wanted:
                transfer.send()
        self._sent |= wanted
        self._arrivals = [torch.cuda.current_stream(d).record_event() for d in self._devices]

    def wait(self) -> None:
        """Wait until all that was sent has arrived."""
        for arrival in self._arrivals:
            arrival.synchronize()


_round = None
_shared: WeakValueDictionary = WeakValueDictionary()  # stages by source and blended tensors


@contextmanager
def staged_once() -> Iterator[None]:
    """Stage a source once for all averages updated inside, where it must not change."""
    global _round
    _round = object()
    try:
        yield
    finally:
        _round = None


def _stage_for(source: nn.Module, blended: set) -> Stage:
    if _round is None:
        return Stage(source, blended)
    key = id(source), frozenset(blended)
    stage = _shared.get(key)
    if stage is None or not stage.holds():
        stage = _shared[key] = Stage(source, blended)
    return stage


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
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.requires_grad


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
