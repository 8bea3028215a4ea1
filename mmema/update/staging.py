"""A source on a GPU as an average in main memory sees it: one update late, and without waiting."""

from __future__ import annotations

from typing import Callable, Dict, List, NamedTuple

import torch
from torch import Tensor, nn

from .direct import Check, Snapshot
from .pairs import Pair, named_tensors, pairs_of

_SMALL = 2**12  # elements up to which tensors travel together


def is_far(average: nn.Module, source: nn.Module) -> bool:
    """Return whether an average in main memory follows a source on a GPU."""
    return any(
        pair.average.device.type == 'cpu' and pair.source.is_cuda
        for pair, _ in pairs_of(average, source)
    )


class Parcel(NamedTuple):
    """Sources that travel together, and the memory they go to."""

    sources: List[Tensor]
    target: Tensor
    is_blended: bool

    def send(self) -> None:
        first = self.sources[0]
        if len(self.sources) > 1:
            first = torch.stack(self.sources) if first.dim() == 0 else torch.cat(self.sources)
        self.target.copy_(first, non_blocking=True)


class Mirror:
    """The tensors of a source in pinned main memory; valid while it holds.

    :meth:`fetch` puts copies into the stream that the GPU works off: they read what the weights are
    at that point, whatever training makes of them next, and the program goes on at once.
    :meth:`wait` returns when they have arrived in ``module``.

    Args:
        source: The model being trained.
        is_blended: Tells from a pair, and whether it is a buffer, if it is blended.
    """

    def __init__(self, source: nn.Module, is_blended: Callable[[Pair, bool], bool]):
        self.source = source
        kinds = {}
        for name, tensor, is_buffer in named_tensors(source):
            kinds[id(tensor)] = tensor, is_buffer, is_blended(Pair(name, tensor, tensor), is_buffer)
        self.parcels = _packed([(tensor, blended) for tensor, _, blended in kinds.values()])
        self.module = _module_of(source, self.parcels)
        self.trees = Snapshot(self.module, source)
        tensors = [tensor for tensor, _, _ in kinds.values()]
        self.devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        self.arrivals: list = []
        self.check = Check(_kind, tensors)

    def holds(self, source: nn.Module) -> bool:
        return source is self.source and self.trees.holds() and self.check.holds()

    def fetch(self, blended: bool) -> None:
        """Send what is copied at every update, and what is blended if ``blended``."""
        for parcel in self.parcels:
            if blended or not parcel.is_blended:
                parcel.send()
        self.arrivals = [torch.cuda.current_stream(d).record_event() for d in self.devices]

    def wait(self) -> None:
        for arrival in self.arrivals:
            arrival.synchronize()


def _kind(tensor: Tensor) -> tuple:
    # With other strides than its target's a source goes through memory that is not pinned.
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.requires_grad


def _packed(tensors: list) -> List[Parcel]:
    """Return parcels: large tensors alone, small ones with those of their kind."""
    together: Dict[tuple, List[Tensor]] = {}
    for tensor, blended in tensors:
        small = tensor.dim() < 2 and 0 < tensor.numel() <= _SMALL
        kind = (tensor.device, tensor.dtype, tensor.dim()) if small else id(tensor)
        together.setdefault((kind, blended), []).append(tensor)
    return [Parcel(group, _memory_for(group), blended) for (_, blended), group in together.items()]


def _memory_for(tensors: List[Tensor]) -> Tensor:
    first = tensors[0].detach()
    pinned = {'device': 'cpu', 'pin_memory': first.is_cuda}
    if len(tensors) == 1:
        return torch.empty_like(first, **pinned)  # in the layout of the source
    return torch.empty(sum(t.numel() for t in tensors), dtype=first.dtype, **pinned)


def _module_of(source: nn.Module, parcels: List[Parcel]) -> nn.Module:
    """Return a bare module with the names of the source and the memory of the parcels."""
    near: Dict[int, Tensor] = {}
    for sources, target, _ in parcels:
        parts = [target]
        if len(sources) > 1:
            cut = target.split([tensor.numel() for tensor in sources])
            parts = [part.view(tensor.shape) for part, tensor in zip(cut, sources)]
        for tensor, part in zip(sources, parts):
            is_parameter = isinstance(tensor, nn.Parameter)
            near[id(tensor)] = nn.Parameter(part, tensor.requires_grad) if is_parameter else part
    root = nn.Module()
    for name, tensor, is_buffer in named_tensors(source):
        *path, leaf = name.split('.')
        owner = root
        for part in path:
            owner = owner._modules.setdefault(part, nn.Module())
        (owner._buffers if is_buffer else owner._parameters)[leaf] = near[id(tensor)]
    return root
