"""The tensors of a model by name, its averaged copy, which tensor follows which, and copying."""

from __future__ import annotations

from copy import deepcopy
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
_SMALL = 2**12  # elements; norms and biases of all usual layers


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside MMDistributedDataParallel and its like, or test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
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

    Sixteen-bit tensors become float32: at a momentum of 2e-4 a bf16 or fp16 average would round
    every step away and never move.
    """
    memo = {}
    for name, tensor, is_buffer in named_tensors(model):
        if id(tensor) not in memo:
            memo[id(tensor)] = _own_copy(name, tensor, is_buffer, device)
    _lay_end_to_end([*memo.values()])
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
    if tensor.layout != torch.strided:
        raise ValueError(
            f'the model must have dense tensors to be averaged, but {name!r} is {tensor.layout}. '
            'Make it dense, or an attribute that is no buffer.'
        )
    device = tensor.device if device is None else device
    dtype = torch.float32 if tensor.dtype in _SIXTEEN_BITS else tensor.dtype
    same = (dtype, device) == (tensor.dtype, tensor.device)
    if is_buffer:
        return tensor.detach().clone() if same else tensor.detach().to(device, dtype)
    if same:
        return deepcopy(tensor)  # keeps what a subclass of Parameter adds
    return nn.Parameter(tensor.detach().to(device, dtype), requires_grad=False)


def _lay_end_to_end(tensors: List[Tensor]) -> None:
    """Move the small vectors on the CPU into one storage for each dtype.

    Norms and biases are two thirds of a detector's tensors and half a percent of its weights: as
    slices of one tensor they are blended by a few operators instead of hundreds.
    """
    vectors: Dict[torch.dtype, List[Tensor]] = {}
    for tensor in tensors:
        if is_small_vector(tensor):
            vectors.setdefault(tensor.dtype, []).append(tensor)
    for group in vectors.values():
        flat = torch.cat([tensor.detach() for tensor in group])
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group])):
            tensor.data = part


def is_small_vector(tensor: Tensor) -> bool:
    return tensor.dim() == 1 and 0 < tensor.numel() <= _SMALL and tensor.device.type == 'cpu'


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
    sources = {canonical_name(name): tensor for name, tensor, _ in named_tensors(source)}
    names = {canonical_name(name) for name, _, _ in named_tensors(average)}
    _refuse_other_names(names, set(sources))
    followed: Dict[int, Pair] = {}
    yielded = set()
    for name, tensor, is_buffer in named_tensors(average):
        pair = Pair(canonical_name(name), tensor, sources[canonical_name(name)])
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
        # After load_state_dict(assign=True) tied tensors are two objects in one place.
        place = tensor.data_ptr(), id(pair.source)
        if place not in yielded:
            yielded.add(place)
            yield pair, is_buffer


def canonical_name(name: str) -> str:
    """Return the name that a tensor has without torch.compile."""
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


def sides(pairs: List[Pair]) -> Tuple[List[Tensor], List[Tensor]]:
    """Return the averages and the sources."""
    return [pair.average for pair in pairs], [pair.source for pair in pairs]


def copy_all(targets: List[Tensor], sources: List[Tensor]) -> None:
    """Copy tensor by tensor, fused where torch can."""
    # torch 2.0 cannot. Later ones up to 2.10 may write wrong numbers on a GPU into targets of more
    # than one dtype (pytorch 173531).
    if hasattr(torch, '_foreach_copy_') and len({target.dtype for target in targets}) == 1:
        torch._foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources):
        target.copy_(source)
