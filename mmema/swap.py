"""Swap: a model has its averaged weights for a while, then its own again."""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .messages import listed
from .update.pairs import Pair, copy_all, pairs_of, sides, unwrapped
from .update.refusals import refuse_pieces
from .update.sharded import Parts, followed, is_sharded

# The averages that are in a model now. Not an attribute: a deep copy of an average is in none.
_swapped: WeakSet = WeakSet()
# The averages that have yet to copy tensors of a source; they must before it gets other numbers.
_owing: WeakSet = WeakSet()


@contextmanager
def averaged_weights(model: nn.Module, ema: nn.Module):
    """Swap the averaged weights into ``model`` inside a ``with`` block.

    The model's parameters share the memory of the average meanwhile; those of another dtype, device
    or memory layout get a copy, as buffers do, which a BatchNorm in training mode writes into. So a
    validation needs no second copy of the weights, the state of the average is right at any time,
    and a float32 average of 16-bit parameters is not rounded. Parameters must not be written into:
    to train from the averaged weights, copy them (`ema.copy_to`). Leaving the block, through an
    exception too, restores the memory of every tensor. A model that is sharded by FSDP2 gets copies
    of all tensors, each rank of its own part.

    If the layers were replaced inside the block, as a switch to deploy form does, no tensor is left
    to restore: the model keeps the averaged weights, in memory of its own.

    Args:
        model: The model, in a wrapper such as MMDistributedDataParallel or not.
        ema: Its average: any ``BaseAveragedModel``, of this package or MMEngine's.

    Yields:
        ``model``.

    Raises:
        RuntimeError: If the average is swapped in already, or updated meanwhile; on leaving, if a
            parameter was written into, by an optimizer's step or another operator in place.
        ValueError: If model and average do not have the same tensors, or the model is sharded by
            FSDP1 or ZeRO-3.

    Examples:
        >>> import torch
        >>> from mmema import ExpMomentumEMA, averaged_weights
        >>> model = torch.nn.Linear(1, 1)
        >>> ema = ExpMomentumEMA(model)
        >>> _ = torch.nn.init.constant_(model.weight, 7.0)
        >>> with averaged_weights(model, ema):
        ...     assert model.weight.item() == ema.module.weight.item() != 7
        >>> model.weight.item()
        7.0
    """
    swap = swap_in(model, ema)
    try:
        yield model
    finally:
        swap.undo()


def refuse_while_swapped(ema: nn.Module, action: str) -> None:
    """Raise RuntimeError while the average is swapped into a model."""
    if ema in _swapped:
        raise RuntimeError(
            f'the model holds the averaged weights now (averaged_weights, or a validation), so it '
            f'cannot {action}. Do it outside.'
        )


def note_owed(ema: nn.Module) -> None:
    """Note that an average has yet to copy tensors of its source."""
    _owing.add(ema)


def finish_copies() -> None:
    """Let all averages copy what they have yet to; call it before a source gets other numbers."""
    while _owing:
        _ = _owing.pop().module  # reading finishes it


def swap_in(model: nn.Module, ema: nn.Module) -> Swap | ShardedSwap:
    """Give a model its averaged weights, until ``undo`` of what is returned is called."""
    return (ShardedSwap if is_sharded(unwrapped(model)) else Swap)(model, ema)


class Swap:
    """A swap of the averaged weights into a model, until `undo` restores the trained ones."""

    def __init__(self, model: nn.Module, ema: nn.Module):
        refuse_while_swapped(ema, 'be given them a second time')
        finish_copies()
        refuse_pieces(model)
        self.model = unwrapped(model)
        self.ema = ema
        pairs = [*pairs_of(ema.module, self.model)]
        self.shapes = _shapes(self.model)
        dicts = [d for m in self.model.modules() for d in (m._parameters, m._buffers)]
        self.places = [(d, key, t) for d in dicts for key, t in d.items() if t is not None]
        self.trained = [(pair.source, pair.source.data) for pair, _ in pairs]
        # All copies before the first change.
        stand_ins = [_stand_in(pair, is_buffer) for pair, is_buffer in pairs]
        self.shared = [
            (pair, _writes(pair.source))
            for (pair, _), stand_in in zip(pairs, stand_ins)
            if stand_in.data_ptr() == pair.average.data_ptr()
        ]
        _swapped.add(ema)
        for (tensor, _), stand_in in zip(self.trained, stand_ins):
            tensor.data = stand_in

    def trained_state(self) -> dict:
        own = {id(tensor): data for tensor, data in self.trained}
        state = self.model.state_dict(keep_vars=True)
        for key, value in state.items():
            value = own.get(id(value), value)
            state[key] = value.detach() if isinstance(value, Tensor) else value
        return state

    def undo(self) -> bool:
        """Restore all tensors; return False if new layers keep the model from it.

        Raises:
            RuntimeError: If the average was written into; the trained tensors are restored first.
        """
        _swapped.discard(self.ema)
        written = [pair.name for pair, writes in self.shared if _writes(pair.source) != writes]
        restored = self._restore()
        if written:
            raise RuntimeError(
                'parameters must not be written into while the model holds the averaged weights, '
                f'but {listed(written)} were, and the average shares their memory. Write outside '
                'of averaged_weights, or into copy.deepcopy(model).'
            )
        return restored

    def _restore(self) -> bool:
        if _shapes(self.model) != self.shapes:
            for tensor, _ in self.trained:
                tensor.data = tensor.data.clone()
            return False
        for tensor, data in self.trained:
            tensor.data = data
        for owner, key, tensor in self.places:
            # `.half()` and `.float()` put other tensors there, with the averaged values. A tensor
            # of another shape is no conversion, but a cache of the model.
            placed = owner.get(key)
            if placed is not None and placed.shape == tensor.shape:
                owner[key] = tensor
        return True


class ShardedSwap:
    """A swap by copying, for a sharded model: FSDP2 gathers from memory of its own."""

    def __init__(self, model: nn.Module, ema: nn.Module):
        refuse_while_swapped(ema, 'be given them a second time')
        finish_copies()
        self.model = unwrapped(model)
        self.ema = ema
        parts = Parts(self.model)
        self.trained = deepcopy(parts)
        copy_weights(parts, ema.module)
        _swapped.add(ema)

    def trained_state(self) -> dict:
        return self.trained.state_dict()

    def undo(self) -> bool:
        """Restore all tensors; return False if new layers keep the model from it."""
        _swapped.discard(self.ema)
        try:
            copy_weights(Parts(self.model), self.trained)
        except ValueError:
            return False
        return True


@torch.no_grad()
def copy_weights(average: nn.Module, source: nn.Module) -> None:
    """Copy all tensors of the source into the average."""
    copy_all(*sides([pair for pair, _ in pairs_of(average, followed(source))]))


def _shapes(model: nn.Module) -> dict:
    return {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}


def _stand_in(pair: Pair, is_buffer: bool) -> Tensor:
    average, source = pair.average.data, pair.source.data
    same = (average.dtype, average.device) == (source.dtype, source.device)
    if same and average.stride() == source.stride() and not is_buffer:
        return average
    return torch.empty_like(source).copy_(average)


def _writes(tensor: Tensor) -> int:
    """Return torch's counter of writes in place; what is written through `.data` is not counted."""
    return 0 if tensor.is_inference() else tensor._version
