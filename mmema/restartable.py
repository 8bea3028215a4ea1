"""Averages that can be restarted while training goes on, one class for each schedule."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import nn

from . import schedules
from .arguments import check_integer
from .averaged import Device, ExpMomentumEMA, LiveValue, MomentumAveragedModel, state_keys
from .messages import warn
from .registry import MODELS, register_everywhere


class Restartable(MomentumAveragedModel):
    """Base of the restartable averages: the restart, and live values in the state.

    The arguments of each class: the model, the fields of its schedule (whose docstring has source
    and example), and those of `ExpMomentumEMA` after ``gamma``. The fields are attributes of
    the average, too: assigning one changes the next update.

    A live value that a restart or an assignment has set comes back with a state that is loaded. One
    that came from the constructor does not: the value of the config that is used now wins over the
    one of the config that was used then. A warning names both.
    """

    restarts = 0
    _changed: frozenset = frozenset()  # live values that are no longer the constructor's

    @property
    def hyperparameters(self) -> dict:
        """The live values by name, as the next update uses them."""
        return {name: getattr(self.schedule, name) for name in self.schedule.live_fields()}

    def _set_live(self, **values) -> None:
        super()._set_live(**values)
        self._changed = self._changed.union(values)

    def check_restart(self, steps: int | None = 0, **changes) -> None:
        """Raise an error if this average cannot be restarted so; change nothing.

        Args:
            steps: As in `restart`.
            **changes: As in `restart`.

        Raises:
            TypeError: If a value has the wrong type.
            ValueError: If a value is out of range, the schedule has no such value, or nothing would
                change.
        """
        known = self.hyperparameters
        new = {name: value for name, value in changes.items() if value is not None}
        unknown = [name for name in new if name not in known]
        if unknown:
            raise ValueError(
                f'a restart can only change what {type(self).__name__} has, got {unknown[0]}; it '
                f'has {", ".join(known) or "no live value"}'
            )
        if steps is not None:
            check_integer('steps', steps, least=0)
        elif not new:
            raise ValueError(
                f'restart(steps=None) must change one of {", ".join(known) or "none"}, got None '
                'for all'
            )
        self._schedule_with(**new)

    def restart(self, steps: int | None = 0, **changes) -> None:
        """Restart the schedule; everything is checked before anything changes.

        Args:
            steps: 0, a hard restart: the next update copies the source, then the schedule begins
                again. Above 0, a soft one: the counter goes there, and part of the average is
                kept; where the next update is to copy, it still does. None: the counter goes on,
                only live values change. Defaults to 0.
            **changes: New live values by name; None leaves one as it is.

        Raises:
            TypeError, ValueError: As `check_restart`.
        """
        self.check_restart(steps, **changes)
        new = {name: value for name, value in changes.items() if value is not None}
        if steps is not None:
            # Of an average that is to be begun, no part can be kept: the copy stays due.
            self.record.copy_is_due |= steps > 0 and int(self.steps) == 0
            self.steps.fill_(steps)
        self._set_live(**new)
        self.restarts += 1
        self.record.note('restart', steps=steps, **new)

    def rewind(self, state_dict: dict) -> None:
        """Take the average, the counter and the record from a state; live values stay."""
        own, record, keys = self.state_dict(), self.record, [*state_keys(self), 'record']
        averaged = {key: state_dict[key] for key in keys if key in state_dict}
        own = {key: value for key, value in own.items() if key not in keys}
        self.load_state_dict({**own, **averaged})
        self.record.parts, self.record.events = record.parts, record.events
        self.record.note('rewind', after=record.updates)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + key: value for key, value in self._live_state().items()})

    def _live_state(self) -> dict:
        """Return the state beside the average, all tensors: MMEngine moves each to the CPU."""
        state = {'restarts': torch.tensor(self.restarts), 'schedule': _encoded(self.schedule.name)}
        for name, value in self.hyperparameters.items():
            state[name] = torch.tensor(value, dtype=torch.float64)
            state[f'changed.{name}'] = torch.tensor(name in self._changed)
        return state

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )
        known = {prefix + key for key in (*self._live_state(), 'changed')}
        unexpected[:] = [key for key in unexpected if key not in known]
        state = {key[len(prefix) :]: state_dict[key] for key in known if key in state_dict}
        names = self.schedule.live_fields()
        if 'changed' in state:  # mmema 0.1.0 kept one tensor, by position
            flags = zip(names, state.pop('changed'))
            state.update({f'changed.{name}': flag for name, flag in flags})
        if 'restarts' in state and all(name in state for name in names):
            self._load_live(state)
        else:
            own = f'; {" and ".join(names)} are those of the config' if names else ''
            warn(
                f'{type(self).__name__} took over an average after {int(self.steps)} updates from '
                f'a state of another class{own}.'
            )

    def _load_live(self, state: dict) -> None:
        self.restarts = int(state['restarts'])
        for name, configured in self.hyperparameters.items():
            saved, was_changed = state[name].item(), bool(state[f'changed.{name}'])
            if was_changed:
                self._set_live(**{name: saved})
            if saved != configured:
                used, other = ('state', 'config') if was_changed else ('config', 'state')
                warn(
                    f'{name}: {getattr(self, name):g} from the {used} is used, the {other} has '
                    f'{configured if was_changed else saved:g}.'
                )


def _encoded(name: str) -> torch.Tensor:
    return torch.tensor(list(name.encode()), dtype=torch.uint8)


@register_everywhere(MODELS)
class RestartableExpMomentumEMA(Restartable, ExpMomentumEMA):
    """`ExpMomentumEMA` whose schedule can be restarted while training goes on.

    ``momentum`` and ``gamma`` are live: assigning them changes the next update. The state holds
    them, and the number of ``restarts``, beside the average. Arguments and errors: those of
    `ExpMomentumEMA`.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> ema = RestartableExpMomentumEMA(model, momentum=0.1, gamma=10)
        >>> for _ in range(1000):
        ...     ema.update_parameters(model)
        >>> round(ema.current_momentum, 4)
        0.1
        >>> ema.restart(steps=5, momentum=0.05)  # soft: part of the average is kept
        >>> round(ema.current_momentum, 4)  # 0.95 * exp(-6 / 10) + 0.05
        0.5714
    """

    def restart(
        self, steps: int | None = 0, momentum: float | None = None, gamma: float | None = None
    ) -> None:
        """Restart the schedule, as `Restartable.restart` says."""
        super().restart(steps, momentum=momentum, gamma=gamma)


@register_everywhere(MODELS)
class RestartableConstantEMA(Restartable):
    """Restartable average with a constant momentum.

    ``momentum(steps) = momentum``
    """

    schedule_type = schedules.ConstantSchedule
    momentum: float = LiveValue()

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
        schedule = schedules.ConstantSchedule(momentum)
        super().__init__(
            model, schedule, interval, device, update_buffers, exclude, skip_non_finite
        )

    def restart(self, steps: int | None = 0, momentum: float | None = None) -> None:
        """Restart the schedule, as `Restartable.restart` says."""
        super().restart(steps, momentum=momentum)


@register_everywhere(MODELS)
class RestartableDebiasedEMA(Restartable):
    """Restartable average that begins as the plain mean and goes over to a constant momentum.

    ``momentum(steps) = momentum / (1 - (1 - momentum) ** (steps / interval + 1))``
    """

    schedule_type = schedules.DebiasedSchedule
    momentum: float = LiveValue()

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
        schedule = schedules.DebiasedSchedule(momentum)
        super().__init__(
            model, schedule, interval, device, update_buffers, exclude, skip_non_finite
        )

    def restart(self, steps: int | None = 0, momentum: float | None = None) -> None:
        """Restart the schedule, as `Restartable.restart` says."""
        super().restart(steps, momentum=momentum)


@register_everywhere(MODELS)
class RestartableThresholdEMA(Restartable):
    """Restartable average whose momentum falls like one over the counter, as TensorFlow has it.

    ``momentum(steps) = max(momentum, (factor - 1) / (factor + steps + offset))``
    """

    schedule_type = schedules.ThresholdSchedule
    momentum: float = LiveValue()
    factor: float = LiveValue()

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
        schedule = schedules.ThresholdSchedule(momentum, factor, offset)
        super().__init__(
            model, schedule, interval, device, update_buffers, exclude, skip_non_finite
        )

    def restart(
        self, steps: int | None = 0, momentum: float | None = None, factor: float | None = None
    ) -> None:
        """Restart the schedule, as `Restartable.restart` says."""
        super().restart(steps, momentum=momentum, factor=factor)


@register_everywhere(MODELS)
class RestartableAnnealingEMA(Restartable):
    """Restartable average whose momentum falls like gamma over the counter, as MMEngine has it.

    ``momentum(steps) = max(momentum, gamma / (gamma + steps))``
    """

    schedule_type = schedules.AnnealingSchedule
    momentum: float = LiveValue()
    gamma: float = LiveValue()

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
        schedule = schedules.AnnealingSchedule(momentum, gamma)
        super().__init__(
            model, schedule, interval, device, update_buffers, exclude, skip_non_finite
        )

    def restart(
        self, steps: int | None = 0, momentum: float | None = None, gamma: float | None = None
    ) -> None:
        """Restart the schedule, as `Restartable.restart` says."""
        super().restart(steps, momentum=momentum, gamma=gamma)


@register_everywhere(MODELS)
class RestartablePowerRampEMA(Restartable):
    """Restartable average whose momentum falls like a power of the counter, as diffusers has it.

    ``momentum(steps) = min(max((1 + steps / gamma) ** -power, momentum), max_momentum)``
    """

    schedule_type = schedules.PowerRampSchedule
    momentum: float = LiveValue()
    gamma: float = LiveValue()
    power: float = LiveValue()
    max_momentum: float = LiveValue()

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
        schedule = schedules.PowerRampSchedule(momentum, gamma, power, max_momentum)
        super().__init__(
            model, schedule, interval, device, update_buffers, exclude, skip_non_finite
        )

    def restart(
        self,
        steps: int | None = 0,
        momentum: float | None = None,
        gamma: float | None = None,
        power: float | None = None,
        max_momentum: float | None = None,
    ) -> None:
        """Restart the schedule, as `Restartable.restart` says."""
        super().restart(
            steps, momentum=momentum, gamma=gamma, power=power, max_momentum=max_momentum
        )


@register_everywhere(MODELS)
class RestartablePowerFunctionEMA(Restartable):
    """Restartable average whose width is a fixed share of the updates since the last restart.

    ``momentum(steps) = 1 - (1 - 1 / t) ** (gamma + 1)`` with ``t = steps / interval + 1`` and
    ``gamma`` from ``sigma_rel``
    """

    schedule_type = schedules.PowerFunctionSchedule
    sigma_rel: float = LiveValue()

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
        schedule = schedules.PowerFunctionSchedule(sigma_rel)
        super().__init__(
            model, schedule, interval, device, update_buffers, exclude, skip_non_finite
        )

    def restart(self, steps: int | None = 0, sigma_rel: float | None = None) -> None:
        """Restart the schedule, as `Restartable.restart` says."""
        super().restart(steps, sigma_rel=sigma_rel)


@register_everywhere(MODELS)
class RestartableUniformAverage(Restartable):
    """Plain mean of the weights at all updates since the last restart.

    ``momentum(steps) = 1 / (1 + steps / interval)``

    Begun with a restart in the last part of a training, this is SWA. A soft restart lets the mean
    so far count as ``steps`` updates.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> ema = RestartableUniformAverage(model)
        >>> for value in (1.0, 2.0, 6.0):
        ...     _ = torch.nn.init.constant_(model.weight, value)
        ...     ema.update_parameters(model)
        >>> ema.module.weight.item()
        3.0

    Source: `mmema.schedules.UniformSchedule`.
    """

    schedule_type = schedules.UniformSchedule

    def __init__(
        self,
        model: nn.Module,
        interval: int = 1,
        device: Device = None,
        update_buffers: bool = False,
        exclude: Sequence[str] = (),
        skip_non_finite: bool = False,
    ) -> None:
        schedule = schedules.UniformSchedule()
        super().__init__(
            model, schedule, interval, device, update_buffers, exclude, skip_non_finite
        )


# By the name of an average of MMEngine, MMDetection or MMYOLO, ours with the same schedule.
STOCK_EQUIVALENTS = {
    'ExpMomentumEMA': RestartableExpMomentumEMA,
    'ExponentialMovingAverage': RestartableConstantEMA,
    'MomentumAnnealingEMA': RestartableAnnealingEMA,
    'StochasticWeightAverage': RestartableUniformAverage,
}
