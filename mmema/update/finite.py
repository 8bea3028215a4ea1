"""Finite numbers: which tensors hold NaN or infinity."""

from __future__ import annotations

import math
from typing import Callable

import torch
from torch import Tensor, nn

from .pairs import named_tensors


def is_number(tensor: Tensor) -> bool:
    """Return whether a tensor can hold NaN: a floating-point or complex one."""
    packed = 'float4' in str(tensor.dtype)  # two in a byte: no operator reads them
    return (tensor.is_floating_point() or tensor.is_complex()) and not packed


def are_finite(tensors: list[Tensor]) -> Tensor:
    """Return for each tensor whether it is finite, as bools on their device, without waiting.

    A tensor is finite if its greatest magnitude is: one fused pass, for any floating-point dtype.

    Args:
        tensors: Floating-point or complex tensors of one device and dtype, none of them empty.
    """
    if tensors[0].element_size() == 1:  # of eight bits, for which there are few operators
        tensors = [tensor.float() for tensor in tensors]
    return torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite()


def names_of_non_finite(model: nn.Module, reduced: Callable | None = None) -> list[str]:
    """Return the names of the tensors of a model that hold NaN or infinity.

    Args:
        model: The model.
        reduced: The method of `mmema.update.sharded.Parts`, to look at the parts of all
            ranks. Defaults to None.
    """
    groups: dict = {}
    for name, tensor, _ in named_tensors(model):
        if is_number(tensor) and tensor.numel():
            names, tensors = groups.setdefault((tensor.dtype, tensor.device), ([], []))
            names.append(name)
            tensors.append(tensor.detach())
    found = {
        name
        for names, tensors in groups.values()
        for name, finite in zip(names, are_finite(tensors).tolist())
        if not finite
    }
    names = [name for name, _, _ in named_tensors(model)]
    if reduced is not None:
        finite = torch.tensor([name not in found for name in names], dtype=torch.uint8)
        found = {name for name, yes in zip(names, reduced(finite, 'MIN').tolist()) if not yes}
    return [name for name in names if name in found]
