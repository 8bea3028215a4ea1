"""Staged follower: a source on a GPU reaches an average in main memory through pinned memory."""

from __future__ import annotations

from typing import Callable, Dict, List, NamedTuple

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
        tensors = [*{id(t): t for _, t, _ in named_tensors(source)}.values()]
        self._transfers = _transfers_of(tensors, selection.blended_in(source))
        self.staged = _staged_copy(source, self._transfers)
        self._inner = self._follow_staged(self.staged)
        self._snapshot = Snapshot(self.staged, source)
        self._kinds = Unchanged(_kind, tensors)
        self._devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        self._arrivals: list = []
        self._pending: list = []  # the momentum of the update that is on its way, if one is
        self._average_changed = False

    def holds(self, average: nn.Module, source: nn.Module) -> bool:
        return (
            average is self.average
            and source is self.source
            and not self._average_changed
            and self._snapshot.holds()
            and self._kinds.holds()
        )

    def update(self, momentum: float | None) -> None:
        for transfer in self._transfers:
            if momentum is not None or not transfer.is_blended:
                transfer.send()
        self._arrivals = [torch.cuda.current_stream(d).record_event() for d in self._devices]
        self._pending.append(momentum)

    @torch.no_grad()
    def finish(self) -> None:
        if not self._pending:
            return
        self.wait()  # where Ctrl-C arrives: nothing has changed yet
        momentum = self._pending.pop()
        if not self._inner.holds(self.average, self.staged):  # the average was converted, say
            self._average_changed = True
            self._inner = self._follow_staged(self.staged)
        self._inner.update(momentum)

    def wait(self) -> None:
        for arrival in self._arrivals:
            arrival.synchronize()


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
