"""Sharded models: the part that this rank has of each tensor, and a view of such a source.

torch's FSDP2 keeps a parameter as a DTensor: a rank has some of its rows. Averaging goes element by
element, so each rank keeps and blends the average of its part: no communication in an update.
"""

from __future__ import annotations

from operator import is_

import torch
from torch import Tensor, nn

from .pairs import named_tensors, unwrapped
from .staleness import Snapshot
from .views import View

_MARK = 'set_reshard_after_backward'  # of a module that fully_shard has taken


def is_dtensor(value) -> bool:
    """Return whether a value is a DTensor: this rank's part of a whole tensor."""
    return isinstance(value, Tensor) and hasattr(value, 'device_mesh')


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model is sharded by FSDP2, or has other parameters that are DTensors."""
    # Between a forward and a reshard the parameters of FSDP2's root module are plain tensors.
    return any(hasattr(module, _MARK) for module in model.modules()) or any(
        map(is_dtensor, model.parameters())
    )


def followed(model: nn.Module) -> nn.Module:
    """Return the module whose tensors an average follows.

    That is the model without wrappers; of a sharded one this rank's `Parts`.
    """
    model = unwrapped(model)
    return Parts(model) if is_sharded(model) else model


class Layout:
    """The place of a part in its whole tensor."""

    def __init__(self, tensor: Tensor):
        self.mesh = tensor.device_mesh
        self.placements = tensor.placements
        self.shape = tensor.shape
        self.stride = tensor.stride()

    def __deepcopy__(self, memo) -> Layout:
        return self  # it never changes, and a mesh cannot be copied

    def whole(self, part: Tensor) -> Tensor:
        """Return the DTensor of which ``part`` is this rank's part."""
        from torch.distributed.tensor import DTensor

        # Without shape and stride, torch takes the parts of all ranks for equally large.
        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )

    def part(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor, or of a DTensor of this layout."""
        if not is_dtensor(tensor):
            tensor = self.distribute(tensor)
        return _local(tensor)

    def distribute(self, tensor: Tensor) -> Tensor:
        """Return a whole tensor, which every rank has, as a DTensor; without communication."""
        from torch.distributed.tensor import distribute_tensor

        tensor = distribute_tensor(tensor, self.mesh, self.placements, src_data_rank=None)
        return self.whole(_local(tensor).clone())  # else it keeps the memory of the whole one

    def empty(self, dtype: torch.dtype) -> Tensor:
        """Return a DTensor without values, in main memory if the mesh is there."""
        from torch.distributed.tensor import empty

        return empty(self.shape, dtype=dtype, device_mesh=self.mesh, placements=self.placements)

    def fits(self, tensor: Tensor) -> bool:
        """Return whether `part` takes a tensor."""
        if tensor.shape != self.shape:
            return False
        return not is_dtensor(tensor) or (
            tensor.device_mesh == self.mesh and tensor.placements == self.placements
        )


class Parts(nn.Module):
    """This rank's part of a sharded model: a bare module whose tensors are plain.

    It has the names of the model, and the memory of its tensors. Its state is that of the whole
    model: it consists of DTensors, and from a whole tensor that is loaded each rank takes its part.
    Making one frees the weights that the model has gathered: FSDP2's root module keeps them after
    an evaluation, and would go on with them whatever was written into the parts.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        reshard(model.modules())
        self.layouts = {name: Layout(t) for name, t, _ in named_tensors(model) if is_dtensor(t)}
        _take_parts(self, model, {}, {})

    def forward(self, *args, **kwargs):
        raise RuntimeError(
            'the average of a sharded model has only the part of this rank, so it cannot be '
            'called. Swap it into the model: with mmema.averaged_weights(model, ema): ...'
        )

    def state_dict(self, *args, prefix: str = '', **kwargs):
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        for name, layout in self.layouts.items():
            if prefix + name in state:
                state[prefix + name] = layout.whole(state[prefix + name].detach())
        return state

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        for name, layout in self.layouts.items():
            value = state.get(prefix + name)
            if value is None:
                continue
            if layout.fits(value):
                state[prefix + name] = layout.part(value)
            else:  # not to be loaded where its shape is that of a part by chance
                del state[prefix + name]
                errors.append(
                    f'{prefix}{name} must be {tuple(layout.shape)}, got {tuple(value.shape)}'
                )
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)

    def reduced(self, values: Tensor, operator: str) -> Tensor:
        """Return ``values`` reduced over the ranks that have the other parts, on every rank.

        Args:
            values: The numbers of this rank.
            operator: 'MIN' or 'SUM'; a sum does not count the replicas of a part.
        """
        if not self.layouts:
            return values
        layout = next(iter(self.layouts.values()))
        reduced = values.to(layout.mesh.device_type, copy=True)
        for number, placement in enumerate(layout.placements):
            if operator != 'SUM' or placement.is_shard():
                torch.distributed.all_reduce(
                    reduced,
                    getattr(torch.distributed.ReduceOp, operator),
                    group=layout.mesh.get_group(number),
                )
        return reduced.to(values.device)

    def replica_groups(self) -> list:
        """Return the process groups of the ranks that have the same parts as this one."""
        layout = next(iter(self.layouts.values()))
        return [
            layout.mesh.get_group(number)
            for number, placement in enumerate(layout.placements)
            if placement.is_replicate()
        ]


def _take_parts(bare: nn.Module, module: nn.Module, modules: dict, parameters: dict) -> nn.Module:
    """Fill a bare module with the parts of a module; what is tied there is tied here."""
    modules[id(module)] = bare
    bare._version = module._version
    bare._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    for key, tensor in module._parameters.items():
        if is_dtensor(tensor) and id(tensor) not in parameters:
            part = _local(tensor).detach()
            parameters[id(tensor)] = nn.Parameter(part, tensor.requires_grad)
        bare._parameters[key] = parameters.get(id(tensor), tensor)
    bare._buffers.update(module._buffers)
    for key, child in module._modules.items():
        if child is not None and id(child) not in modules:
            _take_parts(nn.Module(), child, modules, parameters)
        bare._modules[key] = modules.get(id(child))
    return bare


def _local(tensor: Tensor) -> Tensor:
    # `to_local()` gives another object each time, so that nobody could see it replaced.
    return tensor._local_tensor


def reshard(modules) -> None:
    """Free the gathered weights of the modules that FSDP2 shards; no communication."""
    for module in modules:
        if hasattr(module, _MARK):
            module.reshard()


class PartsView(View):
    """View of a source that is sharded by FSDP2: this rank's part of each of its tensors."""

    def __init__(self, source: nn.Module):
        self.source = source
        self.module = Parts(source)
        self.reduced = self.module.reduced
        self._groups = [module for module in source.modules() if hasattr(module, _MARK)]
        self._objects = Snapshot(source)
        self._tensors = [*{id(t): t for _, t, _ in named_tensors(source) if is_dtensor(t)}.values()]
        self._locals = [*map(_local, self._tensors)]

    def holds(self) -> bool:
        reshard(self._groups)
        return self._objects.holds() and all(map(is_, map(_local, self._tensors), self._locals))


def own_state(state: dict, model: nn.Module) -> dict:
    """Return a state of a model with the whole tensors distributed as the model has them.

    No communication. A tensor of another shape is left for the loader, which tells the user.
    """
    if not is_sharded(model):
        return state
    layouts = Parts(model).layouts
    own = type(state)(state)
    for name, value in state.items():
        if name in layouts and not is_dtensor(value) and layouts[name].fits(value):
            own[name] = layouts[name].distribute(value)
    if hasattr(state, '_metadata'):
        own._metadata = state._metadata
    return own


def own_optimizer_state(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """Return a state of an optimizer with whole tensors distributed as its parameters are.

    Args:
        state: As of ``Optimizer.state_dict``, of a run with any number of ranks.
        optimizer: The optimizer that loads it.
    """
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    numbers = [number for group in state['param_groups'] for number in group['params']]
    slots_of = dict(state['state'])
    for number, parameter in zip(numbers, parameters):
        if is_dtensor(parameter) and number in slots_of:
            layout = Layout(parameter)
            slots_of[number] = {
                key: layout.distribute(value)
                if isinstance(value, Tensor) and not is_dtensor(value) and layout.fits(value)
                else value
                for key, value in slots_of[number].items()
            }
    return {**state, 'state': slots_of}
