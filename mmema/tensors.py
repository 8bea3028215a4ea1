"""Which tensor of the average follows which tensor of the source, and the blend itself."""

from __future__ import annotations

from copy import deepcopy
from itertools import chain
from operator import attrgetter, is_
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from mmengine.model import is_model_wrapper
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_values = dict.values
_kind = attrgetter('dtype', 'device', 'shape', 'requires_grad')
_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside MMDistributedDataParallel and its like."""
    while is_model_wrapper(model):
        model = model.module
    return model


def named_tensors(model: nn.Module) -> Iterator[Tuple[str, Tensor, bool]]:
    """Yield (name, tensor, whether it is a buffer), tied tensors once for each of their names."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter, False
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield name, buffer, True


def averaged_copy(model: nn.Module, device: Optional[torch.device]) -> nn.Module:
    """Copy a model so that every tensor is its own, on ``device``, and exists there only once.

    Sixteen-bit parameters become float32: at a momentum of 2e-4 a bf16 or fp16 average would round
    every step away and never move.
    """
    memo = {}
    for name, tensor, is_buffer in named_tensors(model):
        if id(tensor) not in memo:
            memo[id(tensor)] = _own_copy(name, tensor, is_buffer, device)
    try:
        copied = deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            'the model must be deep-copyable to be averaged, but '
            f'{_first_uncopyable(model, memo)} is not ({error}). Make it a buffer, or detach it.'
        ) from error
    return copied.requires_grad_(False)


def _own_copy(name: str, tensor: Tensor, is_buffer: bool, device: Optional[torch.device]) -> Tensor:
    if is_lazy(tensor):
        raise ValueError(
            f'the model must have all its tensors to be averaged, but {name!r} is lazy and has no '
            'shape yet. Run one forward pass first.'
        )
    device = tensor.device if device is None else device
    if is_buffer:
        copied = tensor.detach()
        return copied.clone() if copied.device == device else copied.to(device)
    dtype = torch.float32 if tensor.dtype in _SIXTEEN_BITS else tensor.dtype
    if (dtype, device) == (tensor.dtype, tensor.device):
        return deepcopy(tensor)  # keeps what a subclass of Parameter adds
    return nn.Parameter(tensor.detach().to(device, dtype), requires_grad=False)


def _first_uncopyable(model: nn.Module, memo: dict) -> str:
    for prefix, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ('_parameters', '_buffers', '_modules'):
                continue
            try:
                deepcopy(value, dict(memo))
            except Exception:
                return repr(f'{prefix}.{key}' if prefix else key)
    return 'one of its attributes'


class Snapshot:
    """The objects in a module's tree, to see at once whether they are still the same.

    Anything that puts another tensor in a place of the tree (re-assigned buffers, a new
    ``nn.Parameter``, ``load_state_dict(assign=True)``, a replaced submodule) changes an identity in
    one of these dicts. Comparing identities costs about a tenth of a microsecond a tensor.
    """

    def __init__(self, model: nn.Module):
        self.dicts = [d for m in model.modules() for d in (m._parameters, m._buffers, m._modules)]
        self.filled = [d for d in self.dicts if d]
        self.objects = [*chain.from_iterable(map(_values, self.filled))]

    def holds(self) -> bool:
        return sum(map(len, self.dicts)) == len(self.objects) and all(
            map(is_, chain.from_iterable(map(_values, self.filled)), self.objects)
        )


class Pair(NamedTuple):
    """One tensor of the average and the tensor of the source that it follows."""

    name: str
    average: Tensor
    source: Tensor


def pairs_of(average: nn.Module, source: nn.Module) -> Iterator[Tuple[Pair, bool]]:
    """Yield (pair, whether it is a buffer), each tensor of the average once.

    Raises:
        ValueError: If the two do not have the same tensors, by name and shape.
    """
    sources = {_plain(name): tensor for name, tensor, _ in named_tensors(source)}
    names = {_plain(name) for name, _, _ in named_tensors(average)}
    _refuse_other_names(names, set(sources))
    followed: Dict[int, Pair] = {}
    for name, tensor, is_buffer in named_tensors(average):
        pair = Pair(_plain(name), tensor, sources[_plain(name)])
        if pair.average.shape != pair.source.shape:
            raise ValueError(
                f'a tensor must keep its shape while it is averaged, but {pair.name!r} is '
                f'{tuple(pair.average.shape)} in the average and {tuple(pair.source.shape)} in the '
                'source. Make a new averaged model after changing the layers.'
            )
        known = followed.setdefault(id(tensor), pair)
        if known.source is not pair.source:
            raise ValueError(
                f'{known.name!r} and {pair.name!r} were one tied tensor when the average was made '
                'and are two in the source now. Make a new averaged model after untying them.'
            )
        if known is pair:
            yield pair, is_buffer


def _plain(name: str) -> str:
    return name.replace('_orig_mod.', '')  # the wrapper that torch.compile adds


def _refuse_other_names(average: set, source: set) -> None:
    if average != source:
        lacks, more = sorted(average - source), sorted(source - average)
        raise ValueError(
            'source and average must have the same tensors, but the source '
            + ' and '.join(
                f'{verb} {names[:3]}{f" and {len(names) - 3} more" if len(names) > 3 else ""}'
                for verb, names in (('lacks', lacks), ('has in addition', more))
                if names
            )
            + '. Make a new averaged model after changing the layers.'
        )


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
        self.source = source
        self.trees = (Snapshot(average), Snapshot(source))
        self.blended: List[Pair] = []
        self.copied: List[Pair] = []
        for pair, is_buffer in pairs_of(average, source):
            (self.blended if is_blended(pair, is_buffer) else self.copied).append(pair)
        every = self.blended + self.copied
        self.tensors = [t for pair in every for t in (pair.average, pair.source)]
        # A Parameter that stays itself can still change its dtype, device or shape through .data.
        self.kinds = [*map(_kind, self.tensors)]
        self.like, self.unlike = _sort_for_blending(self.blended)
        self.copy_to = [pair.average for pair in self.copied]
        self.copy_from = [pair.source for pair in self.copied]

    def holds(self, source: nn.Module) -> bool:
        return (
            source is self.source
            and self.trees[0].holds()
            and self.trees[1].holds()
            and [*map(_kind, self.tensors)] == self.kinds
        )

    def copy(self) -> None:
        """Copy the copied pairs."""
        copy_all(self.copy_to, self.copy_from)

    def copy_blended(self) -> None:
        """Copy the blended pairs, as the first update after a hard restart does."""
        copy_all([pair.average for pair in self.blended], [pair.source for pair in self.blended])

    def blend(self, momentum: float) -> None:
        """``avg <- (1 - momentum) avg + momentum src`` for every blended pair."""
        for averages, sources in self.like:
            torch._foreach_lerp_(averages, sources, momentum)
        for pair in self.unlike:
            average = pair.average
            average.lerp_(pair.source.to(average.device, average.dtype), momentum)


def _sort_for_blending(pairs: List[Pair]):
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


def copy_all(targets: List[Tensor], sources: List[Tensor]) -> None:
    """Copy tensor by tensor, fused where torch can (2.1 and later)."""
    if not targets:
        return
    if hasattr(torch, '_foreach_copy_'):
        torch._foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources):
        target.copy_(source)
