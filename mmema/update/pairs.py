"""Names and pairs: the tensors of a model by canonical name, and which of them follow which."""

from __future__ import annotations

from typing import Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import torch
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model without DDP and its like, torch.compile and test-time augmentation."""
    while True:
        if is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        elif hasattr(model, '_orig_mod'):  # of torch.compile
            model = model._orig_mod
        else:
            return model


def named_tensors(model: nn.Module) -> Iterator[Tuple[str, Tensor, bool]]:
    """Yield (name, tensor, whether it is a buffer), tied tensors once for each of their names."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter, False
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield name, buffer, True


SIXTEEN_BITS = (torch.float16, torch.bfloat16)


class Pair(NamedTuple):
    """One tensor of the average and the tensor of the source that it follows."""

    name: str
    average: Tensor
    source: Tensor


def pairs_of(average: nn.Module, source: nn.Module) -> Iterator[Tuple[Pair, bool]]:
    """Yield (pair, whether it is a buffer) for each tensor of the average and of the source.

    A buffer of the average whose shape the source's has no longer is made anew first.

    Raises:
        ValueError: If the two do not have the same tensors, by name and, of parameters, shape.
    """
    remake_buffers(average, buffers_of(source))
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
        if memory_of(known.source) != memory_of(pair.source):
            raise ValueError(
                f'{known.name!r} and {pair.name!r} were one tied tensor when the average was made '
                'and are two in the source now. Make a new averaged model after untying them.'
            )
        # After load_state_dict(assign=True) tied tensors are two objects in one memory.
        key = memory_of(tensor), id(pair.source)
        if key not in yielded:
            yielded.add(key)
            yield pair, is_buffer


def buffers_of(model: nn.Module) -> Dict[str, Optional[Tensor]]:
    """Return the buffers of a model by name, those that are None, too."""
    return {
        canonical_name(f'{name}.{key}').lstrip('.'): buffer
        for name, module in model.named_modules()
        for key, buffer in module._buffers.items()
    }


def remake_buffers(average: nn.Module, sources: Mapping[str, Optional[Tensor]]) -> None:
    """Give the average new buffers where those of the source have another shape, or are now None.

    Caches and observers change theirs. Of values of two shapes there is no mean: a new one begins
    as a copy.
    """
    for prefix, module in average.named_modules():
        for key, own in module._buffers.items():
            name = canonical_name(f'{prefix}.{key}').lstrip('.')
            new = sources.get(name, own)
            if getattr(own, 'shape', None) != getattr(new, 'shape', None):
                device = next(average.parameters(), new).device if own is None else own.device
                module._buffers[key] = new if new is None else copied_buffer(new, device)


def copied_buffer(buffer: Tensor, device: torch.device | None) -> Tensor:
    """Return the copy of a buffer in an average; one of sixteen bits becomes float32."""
    dtype = torch.float32 if buffer.dtype in SIXTEEN_BITS else buffer.dtype
    return buffer.detach().to(device, dtype, copy=True)


def memory_of(tensor: Tensor) -> tuple:
    """Return a key that two tensors share if they are the same numbers in the same memory."""
    address = tensor.data_ptr()
    if address == 0:  # on the meta device, or empty
        return (id(tensor),)
    return address, tensor.dtype, tensor.shape, tensor.stride()


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
