"""Refusals of models that an average cannot follow, each with the way out."""

from __future__ import annotations

from torch import nn

from ..messages import RunError

# Attributes that mark a sharded model: nothing is imported, nothing is read from a device.
_OF_PARAMETERS = {'_fsdp_flattened': 'FSDP1', 'ds_id': 'DeepSpeed ZeRO-3'}
_OF_MODULES = {'_fsdp_wrapped_module': 'FSDP1'}


def refuse_pieces(model: nn.Module) -> None:
    """Raise RunError if a model is sharded by FSDP1 or ZeRO-3, in its wrapper or taken out of it.

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
            "it in MMDistributedDataParallel, or shard it by FSDP2: runner_type='FlexibleRunner', "
            "strategy=dict(type='mmema.FullyShardStrategy')."
        )
