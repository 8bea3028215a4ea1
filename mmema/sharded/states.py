"""States of a sharded model and its optimizer: distributed over ranks, gathered from them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Callable

from mmengine.dist import is_main_process
from torch import Tensor

from ..update.sharded import Layout, is_dtensor, own_optimizer_state


def own_wrapper_state(state: dict, wrapper) -> dict:
    """Return a state of an optim wrapper with whole tensors distributed as it has them."""
    if hasattr(wrapper, 'optimizer'):
        return own_optimizer_state(state, wrapper.optimizer)
    inner = {name: own_wrapper_state(state[name], one) for name, one in wrapper.items()}
    return {**state, **inner}


def on_cpu(state: dict) -> dict:
    """Return a state on the CPU, but for DTensors: they are gathered one by one, or never."""
    moved = OrderedDict(
        (name, value.cpu() if isinstance(value, Tensor) and not is_dtensor(value) else value)
        for name, value in state.items()
    )
    moved._metadata = getattr(state, '_metadata', OrderedDict())
    return moved


def gathered(content):
    """Return a content with whole tensors on the CPU of rank 0; None for them on all others.

    Every rank must call it with the same structure. No accelerator holds more than one of the whole
    tensors at a time.
    """

    def whole(value, place: tuple):
        if not is_dtensor(value):
            return value
        part = value.to_local()
        if part.device.type != value.device_mesh.device_type:  # kept in main memory
            value = Layout(value).whole(part)
        tensor = value.full_tensor()
        return tensor.cpu() if is_main_process() else None

    return mapped(content, whole)


def mapped(content, change: Callable, place: tuple = ()):
    """Return a copy of nested dicts, lists and tuples with each value inside of them changed.

    Args:
        content: The content of a checkpoint.
        change: Called with a value and its place, a tuple of keys; returns the new value.
        place: The place of the content itself. Defaults to that of the whole checkpoint.
    """
    if isinstance(content, dict):
        new = OrderedDict() if isinstance(content, OrderedDict) else {}
        new.update((key, mapped(value, change, (*place, key))) for key, value in content.items())
        if hasattr(content, '_metadata'):  # the state of a module
            new._metadata = content._metadata
        return new
    if type(content) in (list, tuple):
        parts = [mapped(value, change, (*place, i)) for i, value in enumerate(content)]
        return type(content)(parts)
    return change(content, place)
