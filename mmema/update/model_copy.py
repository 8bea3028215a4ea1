"""Averaged copy: a deep copy of a model in which every tensor has memory of its own."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .pairs import copied_buffer, named_tensors


def averaged_copy(model: nn.Module, device: torch.device | None) -> nn.Module:
    """Copy a model so that every tensor is its own, on ``device``, and exists there only once.

    Sixteen-bit tensors, and parameters of eight bits, become float32: at a momentum of 2e-4 a bf16
    or fp16 average would round every step away and never move.
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


def _own_copy(name: str, tensor: Tensor, is_buffer: bool, device: torch.device | None) -> Tensor:
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
    if is_buffer:
        return copied_buffer(tensor, device)
    coarse = tensor.is_floating_point() and tensor.element_size() < 4
    dtype = torch.float32 if coarse else tensor.dtype
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
