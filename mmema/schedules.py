"""Schedules: the momentum as a function of the step counter, each a frozen dataclass.

A schedule is called with ``steps``, the updates since the last restart, and returns the weight m of
the new value in ``avg <- (1 - m) avg + m src``. Its constructor checks every field and raises
TypeError or ValueError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from .arguments import check_choice, check_integer, check_momentum, check_number, check_positive


@dataclass(frozen=True)
class Schedule:
    """Base of the schedules; checks fields called ``momentum``, ``gamma`` and ``power``."""

    name: ClassVar[str] = ''  # in the state of an average
    fixed: ClassVar[tuple] = ()  # fields that stay as they are for the whole run
    # Whether `steps` counts blends, where an average is blended only at every `interval`-th update:
    # true of schedules that are plain means at their beginning.
    counts_blends: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name == 'momentum':
                check_momentum(self.momentum)
            elif field.name in ('gamma', 'power'):
                check_positive(field.name, getattr(self, field.name))

    def __call__(self, steps: int) -> float:
        """Return the momentum of the update that finds the counter at ``steps``."""
        raise NotImplementedError

    def at(self, steps: int, interval: int) -> float:
        """Return the momentum of a blend that finds the counter at ``steps``."""
        return self(steps // interval if self.counts_blends else steps)

    @classmethod
    def live_fields(cls) -> tuple:
        """Return the names of the fields that a restart or an assignment can change."""
        return tuple(field.name for field in fields(cls) if field.name not in cls.fixed)


@dataclass(frozen=True)
class ExpSchedule(Schedule):
    """Momentum that falls exponentially from 1 to ``momentum``.

    ``(1 - momentum) * exp(-(1 + steps) / gamma) + momentum``

    With decay ``d = 1 - momentum``, ``tau = gamma`` and ``x = steps + 1`` this is one minus the
    decay ``d * (1 - exp(-x / tau))`` of YOLOv5 and YOLOX.

    Args:
        momentum: Value at infinity, in (0, 1). Defaults to 0.0002.
        gamma: Time constant in updates, above 0. The warm-up ends after about
            ``gamma * ln(1 / momentum)`` updates, where its share falls below ``momentum``.
            Defaults to 2000.

    Examples:
        >>> round(ExpSchedule(momentum=0.0002, gamma=2000)(0), 6)
        0.9995
        >>> ExpSchedule()(10**6)
        0.0002

    Source: ``ModelEMA`` of YOLOv5 (ultralytics) and ``ExpMomentumEMA`` of MMDetection.
    """

    name: ClassVar[str] = 'exp'

    momentum: float = 0.0002
    gamma: float = 2000

    def __call__(self, steps: int) -> float:
        warm_up = (1 - self.momentum) * math.exp(-float(1 + steps) / self.gamma)
        return warm_up + self.momentum


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """Momentum that never changes.

    ``momentum``

    Args:
        momentum: The value, in (0, 1): one minus the decay of other libraries. Defaults to 0.0002.

    Examples:
        >>> ConstantSchedule(momentum=0.0002)(500)
        0.0002

    Source: ``ExponentialMovingAverage`` of MMEngine and of torchvision's classification reference,
    ``ModelEmaV2`` of timm.
    """

    name: ClassVar[str] = 'constant'

    momentum: float = 0.0002

    def __call__(self, steps: int) -> float:
        return self.momentum


@dataclass(frozen=True)
class DebiasedSchedule(Schedule):
    """Momentum of a constant-decay average that starts from zero and is debiased, as in Adam.

    ``momentum / (1 - (1 - momentum) ** n)`` with ``n = steps + 1``

    After n updates the i-th has a share in proportion to ``(1 - momentum) ** (n - i)``: at first
    the average is the plain mean, later the exponential one.

    Args:
        momentum: Value at infinity, in (0, 1). Defaults to 0.0002.

    Examples:
        >>> round(DebiasedSchedule(momentum=0.1)(1), 6)  # 0.1 / (1 - 0.81)
        0.526316

    Source: ``ModelEMA(ema_decay_type='normal')`` of PaddleDetection, ``zero_debias`` of TensorFlow.
    """

    name: ClassVar[str] = 'debiased'
    counts_blends: ClassVar[bool] = True

    momentum: float = 0.0002

    def __call__(self, steps: int) -> float:
        return self.momentum / -math.expm1((steps + 1) * math.log1p(-self.momentum))


@dataclass(frozen=True)
class ThresholdSchedule(Schedule):
    """Momentum that falls like ``1 / n`` down to ``momentum``.

    ``max(momentum, (factor - 1) / (factor + n))`` with ``n = steps + offset``

    It is one minus the decay ``min(d, (1 + n) / (factor + n))``.

    Args:
        momentum: The least value, in (0, 1). Defaults to 0.0002.
        factor: How slowly it falls, in updates, above 1. Defaults to 10.
        offset: n at the first update: 1 where the counter is raised before the decay is worked
            out (pytorch_ema, D2Go), 0 where after (PaddleDetection). Defaults to 1.

    Examples:
        >>> round(ThresholdSchedule()(1), 6)  # 9 / 12
        0.75
        >>> ThresholdSchedule()(10**6)
        0.0002

    Source: ``tf.train.ExponentialMovingAverage(num_updates=n)`` of TensorFlow; pytorch_ema;
    ``DECAY_WARM_UP_FACTOR`` of D2Go.
    """

    name: ClassVar[str] = 'threshold'
    fixed: ClassVar[tuple] = ('offset',)

    momentum: float = 0.0002
    factor: float = 10
    offset: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number('factor', self.factor)
        if not 1 < self.factor < math.inf:
            raise ValueError(f'factor must be above 1 and finite, got {self.factor}')
        check_integer('offset', self.offset, least=0)
        check_choice('offset', self.offset, (0, 1))

    def __call__(self, steps: int) -> float:
        return max(self.momentum, (self.factor - 1) / (self.factor + steps + self.offset))


@dataclass(frozen=True)
class AnnealingSchedule(Schedule):
    """Momentum that falls like ``gamma / steps`` down to ``momentum``.

    ``max(momentum, gamma / (gamma + steps))``

    Args:
        momentum: The least value, in (0, 1). It is reached after ``gamma (1 / momentum - 1)``
            updates. Defaults to 0.0002.
        gamma: How slowly it falls, in updates, above 0. Defaults to 100.

    Examples:
        >>> AnnealingSchedule(gamma=100)(100)
        0.5

    Source: ``MomentumAnnealingEMA`` of MMEngine.
    """

    name: ClassVar[str] = 'annealing'

    momentum: float = 0.0002
    gamma: float = 100

    def __call__(self, steps: int) -> float:
        return max(self.momentum, self.gamma / (self.gamma + steps))


@dataclass(frozen=True)
class PowerRampSchedule(Schedule):
    """Momentum that falls like a power of the counter down to ``momentum``.

    ``min(max((1 + steps / gamma) ** -power, momentum), max_momentum)``

    With ``gamma = power = 1`` and no floor this is the plain mean of all updates.

    Args:
        momentum: The least value, in (0, 1). Defaults to 0.0001.
        gamma: Scale of the ramp in updates, above 0. Defaults to 1.
        power: How fast it falls, above 0: 2/3 reaches 0.001 after 31,600 updates at gamma 1, 3/4
            after 10,000. Defaults to 2/3.
        max_momentum: The greatest value, in (0, 1]: one minus the ``min_decay`` of other
            libraries. Defaults to 1.0.

    Examples:
        >>> round(PowerRampSchedule()(7), 6)  # 8 ** (-2 / 3)
        0.25

    Source: ``EMAModel(use_ema_warmup=True)`` of diffusers, ``ModelEmaV3(use_warmup=True)`` of timm;
    both after K. Crowson's EMAWarmup.
    """

    name: ClassVar[str] = 'power_ramp'

    momentum: float = 0.0001
    gamma: float = 1
    power: float = 2 / 3
    max_momentum: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number('max_momentum', self.max_momentum)
        if not 0 < self.max_momentum <= 1:
            raise ValueError(f'max_momentum must be in (0, 1], got {self.max_momentum}')

    def __call__(self, steps: int) -> float:
        ramp = (1 + steps / self.gamma) ** -self.power
        return min(max(ramp, self.momentum), self.max_momentum)


@dataclass(frozen=True)
class PowerFunctionSchedule(Schedule):
    """Momentum whose averages weigh update t in proportion to ``t ** gamma``.

    ``1 - (1 - 1 / t) ** (gamma + 1)`` with ``t = steps + 1`` and ``gamma`` from ``sigma_rel``

    The width of such an average grows with the length of training, so it needs no floor.

    Args:
        sigma_rel: Width as a share of the updates so far, above 0 and at most ``1 / sqrt(12)`` =
            0.2887, which is the plain mean's; see `power_function_gamma`. At 0.10 the last
            third of the updates has 96 % of the weight. Defaults to 0.10.

    Examples:
        >>> round(PowerFunctionSchedule(sigma_rel=0.10)(99), 4)  # 1 - 0.99 ** 7.94
        0.0767

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
    2023, section 3.1.
    """

    name: ClassVar[str] = 'power_function'
    counts_blends: ClassVar[bool] = True

    sigma_rel: float = 0.10

    def __post_init__(self) -> None:
        check_number('sigma_rel', self.sigma_rel)
        most = power_function_sigma_rel(0)
        if not 0 < self.sigma_rel <= most:
            raise ValueError(
                f'sigma_rel must be above 0 and at most 1 / sqrt(12) = {most:.4f}, the plain '
                f'mean, got {self.sigma_rel}'
            )
        object.__setattr__(self, '_gamma', power_function_gamma(self.sigma_rel))

    def __call__(self, steps: int) -> float:
        return 1 - (1 - 1 / (steps + 1)) ** (self._gamma + 1)


@dataclass(frozen=True)
class UniformSchedule(Schedule):
    """Momentum of the plain mean of all updates since the last restart.

    ``1 / (1 + steps)``

    Examples:
        >>> UniformSchedule()(3)
        0.25

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
    2018 (SWA); torch's ``AveragedModel`` and MMEngine's ``StochasticWeightAverage``.
    """

    name: ClassVar[str] = 'uniform'
    counts_blends: ClassVar[bool] = True

    def __call__(self, steps: int) -> float:
        return 1 / (1 + steps)


BY_NAME = {schedule.name: schedule for schedule in Schedule.__subclasses__()}


def power_function_sigma_rel(gamma: float) -> float:
    """Width of a power-function average as a share of the training so far.

    ``sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))``, the standard deviation of a probability
    density in proportion to ``t ** gamma`` on [0, 1].

    Args:
        gamma: Exponent of the power function, at least 0.

    Returns:
        sigma_rel, at most ``1 / sqrt(12)`` = 0.2887, which is the plain mean's.

    Examples:
        >>> round(power_function_sigma_rel(6.94), 3)
        0.1

    Source: Karras et al. 2023, section 3.1.
    """
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def power_function_gamma(sigma_rel: float) -> float:
    """Exponent of the power-function average with a given relative width.

    The inverse of `power_function_sigma_rel`, found by bisection.

    Args:
        sigma_rel: Standard deviation as a share of the training so far, above 0 and at most
            ``1 / sqrt(12)`` = 0.2887. The paper uses 0.05 and 0.10.

    Returns:
        gamma, at least 0.

    Examples:
        >>> round(power_function_gamma(0.05), 2), round(power_function_gamma(0.10), 2)
        (16.97, 6.94)

    Source: Karras et al. 2023, section 3.1.
    """
    low, high = 0.0, 1 / sigma_rel  # sigma_rel(gamma) falls, and is below 1 / gamma
    for _ in range(100):
        middle = (low + high) / 2
        if power_function_sigma_rel(middle) > sigma_rel:
            low = middle
        else:
            high = middle
    return low


def momentum_of_half_life(half_life: float) -> float:
    """Momentum at which the share of an update is halved every ``half_life`` updates.

    ``1 - 0.5 ** (1 / half_life)``

    Args:
        half_life: In updates, above 0. A half-life in pictures has to be divided by the batch size.

    Returns:
        The momentum, in (0, 1).

    Examples:
        >>> momentum_of_half_life(1)
        0.5

    Source: ``ema_halflife_kimg`` of EDM (Karras et al. 2022).
    """
    return -math.expm1(math.log(0.5) / half_life)
