"""Buffers that are copied even where others are blended: a mean of two values is none of them."""

from __future__ import annotations

from typing import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm

_OBSERVERS = ('torch.ao.quantization', 'torch.quantization', 'torchao.quantization')


def constrained_buffers(model: nn.Module) -> Iterator[Tensor]:
    """Yield the buffers that must keep a property which a mean has not.

    Those are the unit vectors and other state of parametrizations, ranges and scales of
    quantization observers, and masks of pruning.
    """
    for module in model.modules():
        owners, names = [], []
        if isinstance(module, ParametrizationList):
            owners = [*module.modules()]
        elif any(cls.__module__.startswith(_OBSERVERS) for cls in type(module).__mro__):
            owners = [module]
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                names += [f'{hook.name}_u', f'{hook.name}_v']
            elif isinstance(hook, BasePruningMethod):
                names.append(f'{hook._tensor_name}_mask')
        yield from (module._buffers[name] for name in names if name in module._buffers)
        yield from (t for owner in owners for t in owner._buffers.values() if t is not None)


def masks_in(model: nn.Module) -> Iterator[Tensor]:
    """Yield the buffers that hold infinities and no NaN, as a mask of attention does.

    Between two infinities a blend is NaN. A running statistic is no mask: there an infinity is a
    fault. Waits for the device.
    """
    for module in model.modules():
        if isinstance(module, _NormBase):
            continue
        for tensor in module._buffers.values():
            if tensor is not None and tensor.is_floating_point() and not tensor.is_meta:
                values = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
                if bool(values.isinf().any()) and not bool(values.isnan().any()):
                    yield tensor
