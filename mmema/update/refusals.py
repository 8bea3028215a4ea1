"""Refusals of models that an average cannot follow, each with the way out."""

from __future__ import annotations

from torch import nn

from ..messages import RunError

# Attributes that mark a sharded model: nothing is imported, nothing is read from a device.
_OF_PARAMETERS = {'_fsdp_flattened': 'FSDP1', 'ds_id': 'DeepSpeed ZeRO-3', 'device_mesh': 'FSDP2'}
# FSDP2 leaves plain parameters in its root module after a forward.
_OF_MODULES = {'_fsdp_wrapped_module': 'FSDP1', 'set_reshard_after_backward': 'FSDP2'}


def refuse_sharded(model: nn.Module) -> None:
    """Raise RunError if a model is sharded, in its wrapper or taken out of it.

    Each rank of FSDP1 and ZeRO-3 holds flat or empty pieces of the parameters and computes with
    other memory, so weights that are averaged or swapped there are wrong, and nothing shows it.
    """
    marked = [
        sharding
        for things, marks in ((model.parameters(), _OF_PARAMETERS), (model.modules(), _OF_MODULES))
        for thing in things
        for mark, sharding in marks.items()
        if hasattr(thing, mark)
    ]
    if marked:
        raise RunError(
            f'a model that is averaged must not be sharded, but this one is, by {marked[0]}. Wrap '
            'it in MMDistributedDataParallel instead.'
        )
