"""The other schedules of the field, each as an averaged model that can be restarted."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Optional, Sequence

from torch import nn

from . import schedules
from .arguments import check_momentum, check_positive, real
from .averaged import Device, Restartable, warn_of_large
from .registry import MODELS, register_everywhere

_gamma_of = lru_cache(maxsize=None)(schedules.power_function_gamma)


class _WithMomentum(Restartable):
    """An average with a live ``momentum``; the schedules of this file differ in what else."""

    _LIVE = ('momentum',)

    def __init__(
        self,
        model: nn.Module,
        momentum: float,
        interval: int,
        device: Device,
        update_buffers: bool,
        exclude: Sequence[str],
        skip_non_finite: bool,
    ) -> None:
        self.check_hyperparameters(momentum=momentum)
        super().__init__(model, interval, device, update_buffers, exclude, skip_non_finite)
        self.momentum = momentum
        warn_of_large(momentum)

    @staticmethod
    def check_hyperparameters(momentum: Optional[float] = None) -> None:
        """Raise TypeError or ValueError if a given value breaks its rule."""
        check_momentum(momentum)


@register_everywhere(MODELS)
class RestartableConstantEMA(_WithMomentum):
    """Average with a constant momentum.

    ``momentum(steps) = momentum``

    Args:
        model: The model to average.
        momentum: Weight of the new value, in (0, 1). Defaults to 0.0002.
        interval: Parameters are blended at every ``interval``-th update. Defaults to 1.
        device: Where the average is kept. Defaults to None, the device of each tensor.
        update_buffers: Whether float buffers are blended rather than copied. Defaults to False.
        exclude: Names or patterns of tensors that are copied instead. Defaults to none.
        skip_non_finite: Whether source tensors that are not finite are left out of that update.
            Defaults to False.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range or the model cannot be copied.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> ema = RestartableConstantEMA(model, momentum=0.1)
        >>> ema.update_parameters(model)  # the first update copies
        >>> ema.current_momentum
        0.1

    Source: :func:`mmema.schedules.constant_momentum`.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        interval: int = 1,
        device: Device = None,
        update_buffers: bool = False,
        exclude: Sequence[str] = (),
        skip_non_finite: bool = False,
    ) -> None:
        super().__init__(
            model, momentum, interval, device, update_buffers, exclude, skip_non_finite
        )

    def momentum_at(self, steps: int) -> float:
        return schedules.constant_momentum(steps, self.momentum)

    def restart(self, steps: Optional[int] = 0, momentum: Optional[float] = None) -> None:
        """Restart; see :meth:`mmema.RestartableExpMomentumEMA.restart`."""
        self._restart(steps, momentum=momentum)


@register_everywhere(MODELS)
class RestartableDebiasedEMA(_WithMomentum):
    """Average that begins as the plain mean of all updates and goes over to a constant momentum.

    ``momentum(steps) = momentum / (1 - (1 - momentum) ** (steps / interval + 1))``

    Args:
        model: The model to average.
        momentum: Weight of the new value in the long run, in (0, 1). Defaults to 0.0002.
        interval: Parameters are blended at every ``interval``-th update. Defaults to 1.
        device: Where the average is kept. Defaults to None, the device of each tensor.
        update_buffers: Whether float buffers are blended rather than copied. Defaults to False.
        exclude: Names or patterns of tensors that are copied instead. Defaults to none.
        skip_non_finite: Whether source tensors that are not finite are left out of that update.
            Defaults to False.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range or the model cannot be copied.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> ema = RestartableDebiasedEMA(model, momentum=0.1)
        >>> ema.update_parameters(model)  # the first update copies
        >>> round(ema.current_momentum, 4)  # 0.1 / (1 - 0.81)
        0.5263

    Source: :func:`mmema.schedules.debiased_momentum`.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        interval: int = 1,
        device: Device = None,
        update_buffers: bool = False,
        exclude: Sequence[str] = (),
        skip_non_finite: bool = False,
    ) -> None:
        super().__init__(
            model, momentum, interval, device, update_buffers, exclude, skip_non_finite
        )

    def momentum_at(self, steps: int) -> float:
        return schedules.debiased_momentum(steps // self.interval, self.momentum)

    def restart(self, steps: Optional[int] = 0, momentum: Optional[float] = None) -> None:
        """Restart; see :meth:`mmema.RestartableExpMomentumEMA.restart`."""
        self._restart(steps, momentum=momentum)


@register_everywhere(MODELS)
class RestartableThresholdEMA(_WithMomentum):
    """Average whose momentum falls like one over the counter, as TensorFlow has it.

    ``momentum(steps) = max(momentum, (factor - 1) / (factor + steps + offset))``

    Args:
        model: The model to average.
        momentum: Least weight of the new value, in (0, 1). Defaults to 0.0002.
        factor: How slowly the momentum falls, in updates, above 1. Defaults to 10.
        offset: The count of the first update: 1 (pytorch_ema, D2Go) or 0 (PaddleDetection).
            Defaults to 1.
        interval: Parameters are blended at every ``interval``-th update. Defaults to 1.
        device: Where the average is kept. Defaults to None, the device of each tensor.
        update_buffers: Whether float buffers are blended rather than copied. Defaults to False.
        exclude: Names or patterns of tensors that are copied instead. Defaults to none.
        skip_non_finite: Whether source tensors that are not finite are left out of that update.
            Defaults to False.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range or the model cannot be copied.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> ema = RestartableThresholdEMA(model)
        >>> ema.update_parameters(model)  # the first update copies
        >>> ema.current_momentum  # 9 / 12
        0.75

    Source: :func:`mmema.schedules.threshold_momentum`.
    """

    _LIVE = ('momentum', 'factor')

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        factor: float = 10,
        offset: int = 1,
        interval: int = 1,
        device: Device = None,
        update_buffers: bool = False,
        exclude: Sequence[str] = (),
        skip_non_finite: bool = False,
    ) -> None:
        self.check_hyperparameters(factor=factor)
        if offset not in (0, 1) or isinstance(offset, bool):
            raise ValueError(f'offset must be 0 or 1, got {offset!r}')
        super().__init__(
            model, momentum, interval, device, update_buffers, exclude, skip_non_finite
        )
        self.factor = factor
        self.offset = offset

    @staticmethod
    def check_hyperparameters(
        momentum: Optional[float] = None, factor: Optional[float] = None
    ) -> None:
        """Raise TypeError or ValueError if a given value breaks its rule."""
        check_momentum(momentum)
        if factor is not None and not 1 < real('factor', factor) < math.inf:
            raise ValueError(f'factor must be above 1 and finite, got {factor}')

    def momentum_at(self, steps: int) -> float:
        return schedules.threshold_momentum(steps, self.momentum, self.factor, self.offset)

    def restart(
        self,
        steps: Optional[int] = 0,
        momentum: Optional[float] = None,
        factor: Optional[float] = None,
    ) -> None:
        """Restart; see :meth:`mmema.RestartableExpMomentumEMA.restart`."""
        self._restart(steps, momentum=momentum, factor=factor)


@register_everywhere(MODELS)
class RestartableAnnealingEMA(_WithMomentum):
    """Average whose momentum falls like gamma over the counter, as MMEngine has it.

    ``momentum(steps) = max(momentum, gamma / (gamma + steps))``

    Args:
        model: The model to average.
        momentum: Least weight of the new value, in (0, 1). Defaults to 0.0002.
        gamma: How slowly the momentum falls, in updates, above 0. Defaults to 100.
        interval: Parameters are blended at every ``interval``-th update. Defaults to 1.
        device: Where the average is kept. Defaults to None, the device of each tensor.
        update_buffers: Whether float buffers are blended rather than copied. Defaults to False.
        exclude: Names or patterns of tensors that are copied instead. Defaults to none.
        skip_non_finite: Whether source tensors that are not finite are left out of that update.
            Defaults to False.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range or the model cannot be copied.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> ema = RestartableAnnealingEMA(model, gamma=3)
        >>> ema.update_parameters(model)  # the first update copies
        >>> ema.current_momentum  # 3 / (3 + 1)
        0.75

    Source: :func:`mmema.schedules.annealing_momentum`.
    """

    _LIVE = ('momentum', 'gamma')

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        gamma: float = 100,
        interval: int = 1,
        device: Device = None,
        update_buffers: bool = False,
        exclude: Sequence[str] = (),
        skip_non_finite: bool = False,
    ) -> None:
        self.check_hyperparameters(gamma=gamma)
        super().__init__(
            model, momentum, interval, device, update_buffers, exclude, skip_non_finite
        )
        self.gamma = gamma

    @staticmethod
    def check_hyperparameters(
        momentum: Optional[float] = None, gamma: Optional[float] = None
    ) -> None:
        """Raise TypeError or ValueError if a given value breaks its rule."""
        check_momentum(momentum)
        check_positive('gamma', gamma)

    def momentum_at(self, steps: int) -> float:
        return schedules.annealing_momentum(steps, self.momentum, self.gamma)

    def restart(
        self,
        steps: Optional[int] = 0,
        momentum: Optional[float] = None,
        gamma: Optional[float] = None,
    ) -> None:
        """Restart; see :meth:`mmema.RestartableExpMomentumEMA.restart`."""
        self._restart(steps, momentum=momentum, gamma=gamma)


@register_everywhere(MODELS)
class RestartablePowerRampEMA(_WithMomentum):
    """Average whose momentum falls like a power of the counter, as diffusers and timm have it.

    ``momentum(steps) = min(max((1 + steps / gamma) ** -power, momentum), max_momentum)``

    Args:
        model: The model to average.
        momentum: Least weight of the new value, in (0, 1). Defaults to 0.0001.
        gamma: Scale of the ramp in updates, above 0. Defaults to 1.
        power: How fast the momentum falls, above 0. Defaults to 2/3.
        max_momentum: Greatest weight of the new value, in (0, 1]. Defaults to 1.0.
        interval: Parameters are blended at every ``interval``-th update. Defaults to 1.
        device: Where the average is kept. Defaults to None, the device of each tensor.
        update_buffers: Whether float buffers are blended rather than copied. Defaults to False.
        exclude: Names or patterns of tensors that are copied instead. Defaults to none.
        skip_non_finite: Whether source tensors that are not finite are left out of that update.
            Defaults to False.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range or the model cannot be copied.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> ema = RestartablePowerRampEMA(model, power=1)
        >>> ema.update_parameters(model)  # the first update copies
        >>> ema.current_momentum  # the mean of two
        0.5

    Source: :func:`mmema.schedules.power_ramp_momentum`.
    """

    _LIVE = ('momentum', 'gamma', 'power', 'max_momentum')

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0001,
        gamma: float = 1,
        power: float = 2 / 3,
        max_momentum: float = 1.0,
        interval: int = 1,
        device: Device = None,
        update_buffers: bool = False,
        exclude: Sequence[str] = (),
        skip_non_finite: bool = False,
    ) -> None:
        self.check_hyperparameters(gamma=gamma, power=power, max_momentum=max_momentum)
        super().__init__(
            model, momentum, interval, device, update_buffers, exclude, skip_non_finite
        )
        self.gamma = gamma
        self.power = power
        self.max_momentum = max_momentum

    @staticmethod
    def check_hyperparameters(
        momentum: Optional[float] = None,
        gamma: Optional[float] = None,
        power: Optional[float] = None,
        max_momentum: Optional[float] = None,
    ) -> None:
        """Raise TypeError or ValueError if a given value breaks its rule."""
        check_momentum(momentum)
        check_positive('gamma', gamma)
        check_positive('power', power)
        if max_momentum is not None and not 0 < real('max_momentum', max_momentum) <= 1:
            raise ValueError(f'max_momentum must be in (0, 1], got {max_momentum}')

    def momentum_at(self, steps: int) -> float:
        return schedules.power_ramp_momentum(
            steps, self.momentum, self.gamma, self.power, self.max_momentum
        )

    def restart(
        self,
        steps: Optional[int] = 0,
        momentum: Optional[float] = None,
        gamma: Optional[float] = None,
        power: Optional[float] = None,
        max_momentum: Optional[float] = None,
    ) -> None:
        """Restart; see :meth:`mmema.RestartableExpMomentumEMA.restart`."""
        self._restart(steps, momentum=momentum, gamma=gamma, power=power, max_momentum=max_momentum)


@register_everywhere(MODELS)
class RestartablePowerFunctionEMA(Restartable):
    """Average whose width is a fixed share of the updates since the last restart.

    ``momentum(steps) = 1 - (1 - 1 / t) ** (gamma + 1)`` with ``t = steps / interval + 1`` and
    ``gamma`` from ``sigma_rel``

    Args:
        model: The model to average.
        sigma_rel: Width as a share of the updates so far, above 0 and at most ``1 / sqrt(12)`` =
            0.2887. At 0.10 the last third of the updates has 96 % of the weight. Defaults to 0.10.
        interval: Parameters are blended at every ``interval``-th update. Defaults to 1.
        device: Where the average is kept. Defaults to None, the device of each tensor.
        update_buffers: Whether float buffers are blended rather than copied. Defaults to False.
        exclude: Names or patterns of tensors that are copied instead. Defaults to none.
        skip_non_finite: Whether source tensors that are not finite are left out of that update.
            Defaults to False.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range or the model cannot be copied.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> ema = RestartablePowerFunctionEMA(model, sigma_rel=0.10)
        >>> for _ in range(99):
        ...     ema.update_parameters(model)
        >>> round(ema.current_momentum, 4)  # 1 - 0.99 ** 7.94
        0.0767

    Source: :func:`mmema.schedules.power_function_momentum`.
    """

    _LIVE = ('sigma_rel',)

    def __init__(
        self,
        model: nn.Module,
        sigma_rel: float = 0.10,
        interval: int = 1,
        device: Device = None,
        update_buffers: bool = False,
        exclude: Sequence[str] = (),
        skip_non_finite: bool = False,
    ) -> None:
        self.check_hyperparameters(sigma_rel=sigma_rel)
        super().__init__(model, interval, device, update_buffers, exclude, skip_non_finite)
        self.sigma_rel = sigma_rel

    @staticmethod
    def check_hyperparameters(sigma_rel: Optional[float] = None) -> None:
        """Raise TypeError or ValueError if a given value breaks its rule."""
        most = schedules.power_function_sigma_rel(0)
        if sigma_rel is not None and not 0 < real('sigma_rel', sigma_rel) <= most:
            raise ValueError(
                f'sigma_rel must be above 0 and at most 1 / sqrt(12) = {most:.4f}, the plain '
                f'mean, got {sigma_rel}'
            )

    def momentum_at(self, steps: int) -> float:
        return schedules.power_function_momentum(
            steps // self.interval, _gamma_of(float(self.sigma_rel))
        )

    def restart(self, steps: Optional[int] = 0, sigma_rel: Optional[float] = None) -> None:
        """Restart; see :meth:`mmema.RestartableExpMomentumEMA.restart`."""
        self._restart(steps, sigma_rel=sigma_rel)
