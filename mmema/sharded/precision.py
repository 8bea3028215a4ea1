"""Mixed precision of a model sharded by FSDP2: its settings, and what is cast where."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn

from ..arguments import check_bool

_POLICY = ('param_dtype', 'reduce_dtype', 'output_dtype', 'cast_forward_inputs')


def checked_policy(mixed_precision: dict | None) -> dict:
    """Return the arguments of a MixedPrecisionPolicy, with dtypes in place of their names."""
    if not isinstance(mixed_precision or {}, dict):
        raise TypeError(f'mixed_precision must be a dict or None, got {mixed_precision!r}')
    policy = dict(mixed_precision or {})
    for name, value in policy.items():
        if name not in _POLICY:
            raise ValueError(f'mixed_precision takes {", ".join(_POLICY)}, got {name!r}')
        if name == 'cast_forward_inputs':
            check_bool(name, value)
            continue
        dtype = getattr(torch, value, None) if isinstance(value, str) else value
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{name} must be a dtype such as 'bfloat16', got {value!r}")
        policy[name] = dtype
    return policy


def own_precision(norm: nn.Module, dtype: torch.dtype):
    """Return a policy that computes with a layer as it is, between layers of another dtype."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    own = norm.weight.dtype if norm.affine else torch.float32
    return MixedPrecisionPolicy(param_dtype=own, reduce_dtype=own, output_dtype=dtype)


def cast_inputs(dtype: torch.dtype, args: tuple, kwargs: dict) -> tuple:
    """Return arguments of a group with floating-point tensors in another dtype, but for dicts.

    FSDP2's own cast also rounds the boxes that MMYOLO passes in a dict, to 2 pixels of 512 in bf16.
    """

    def cast(value):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(dtype)
        return type(value)(map(cast, value)) if type(value) in (list, tuple) else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def with_cast(method: Callable, cast: Callable) -> Callable:
    def call(*args, **kwargs):
        args, kwargs = cast(args, kwargs)
        return method(*args, **kwargs)

    return call
