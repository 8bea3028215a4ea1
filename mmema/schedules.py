"""How much of the source enters the average: pure functions of the step counter."""

from __future__ import annotations

import math


def exp_momentum(steps: int, momentum: float, gamma: float) -> float:
    """Momentum that falls exponentially from 1 to ``momentum``.

    ``(1 - momentum) * exp(-(1 + steps) / gamma) + momentum``

    With decay ``d = 1 - momentum``, ``tau = gamma`` and ``x = steps + 1`` this is one minus the
    decay ``d * (1 - exp(-x / tau))`` of YOLOv5 and YOLOX.

    Args:
        steps: Updates since the last restart, from 0.
        momentum: Value at infinity, in (0, 1).
        gamma: Time constant in updates, above 0. The warm-up ends after about
            ``gamma * ln(1 / momentum)`` updates, where its share falls below ``momentum``.

    Returns:
        The weight of the new value in ``avg <- (1 - m) avg + m src``.

    Example:
        >>> round(exp_momentum(0, momentum=0.0002, gamma=2000), 6)
        0.9995
        >>> exp_momentum(10**6, momentum=0.0002, gamma=2000)
        0.0002

    Source: ``ModelEMA`` of YOLOv5 (ultralytics) and ``ExpMomentumEMA`` of MMDetection.
    """
    return (1 - momentum) * math.exp(-float(1 + steps) / gamma) + momentum


def constant_momentum(steps: int, momentum: float) -> float:
    """Momentum that never changes.

    ``momentum``

    Args:
        steps: Updates since the last restart; not used.
        momentum: The value, in (0, 1): one minus the decay of other libraries.

    Returns:
        The weight of the new value in ``avg <- (1 - m) avg + m src``.

    Example:
        >>> constant_momentum(500, momentum=0.0002)
        0.0002

    Source: ``ExponentialMovingAverage`` of MMEngine and of torchvision's classification reference,
    ``ModelEmaV2`` of timm.
    """
    return momentum


def threshold_momentum(steps: int, momentum: float, factor: float = 10, offset: int = 1) -> float:
    """Momentum that falls like ``1 / n`` down to ``momentum``.

    ``max(momentum, (factor - 1) / (factor + n))`` with ``n = steps + offset``

    It is one minus the decay ``min(d, (1 + n) / (factor + n))``.

    Args:
        steps: Updates since the last restart, from 0.
        momentum: The least value, in (0, 1).
        factor: How slowly it falls, in updates, above 1. Defaults to 10.
        offset: n at the first update: 1 where the counter is raised before the decay is worked
            out (pytorch_ema, D2Go), 0 where after (PaddleDetection). Defaults to 1.

    Returns:
        The weight of the new value in ``avg <- (1 - m) avg + m src``.

    Example:
        >>> round(threshold_momentum(1, momentum=0.0002), 6)  # 9 / 12
        0.75
        >>> threshold_momentum(10**6, momentum=0.0002)
        0.0002

    Source: ``tf.train.ExponentialMovingAverage(num_updates=n)`` of TensorFlow; pytorch_ema;
    ``DECAY_WARM_UP_FACTOR`` of D2Go.
    """
    return max(momentum, (factor - 1) / (factor + steps + offset))


def annealing_momentum(steps: int, momentum: float, gamma: float) -> float:
    """Momentum that falls like ``gamma / steps`` down to ``momentum``.

    ``max(momentum, gamma / (gamma + steps))``

    Args:
        steps: Updates since the last restart, from 0.
        momentum: The least value, in (0, 1). It is reached after ``gamma (1 / momentum - 1)``
            updates.
        gamma: How slowly it falls, in updates, above 0.

    Returns:
        The weight of the new value in ``avg <- (1 - m) avg + m src``.

    Example:
        >>> annealing_momentum(100, momentum=0.0002, gamma=100)
        0.5

    Source: ``MomentumAnnealingEMA`` of MMEngine.
    """
    return max(momentum, gamma / (gamma + steps))


def power_ramp_momentum(
    steps: int, momentum: float, gamma: float, power: float, max_momentum: float = 1.0
) -> float:
    """Momentum that falls like a power of the counter down to ``momentum``.

    ``min(max((1 + steps / gamma) ** -power, momentum), max_momentum)``

    With ``gamma = power = 1`` and no floor this is the plain mean of all updates.

    Args:
        steps: Updates since the last restart, from 0.
        momentum: The least value, in (0, 1).
        gamma: Scale of the ramp in updates, above 0.
        power: How fast it falls, above 0: 2/3 reaches 0.001 after 31,600 updates at gamma 1, 3/4
            after 10,000.
        max_momentum: The greatest value, in (0, 1]: one minus the ``min_decay`` of other
            libraries. Defaults to 1.0.

    Returns:
        The weight of the new value in ``avg <- (1 - m) avg + m src``.

    Example:
        >>> round(power_ramp_momentum(7, momentum=0.0001, gamma=1, power=2 / 3), 6)  # 8 ** (-2 / 3)
        0.25

    Source: ``EMAModel(use_ema_warmup=True)`` of diffusers, ``ModelEmaV3(use_warmup=True)`` of timm;
    both after K. Crowson's EMAWarmup.
    """
    return min(max((1 + steps / gamma) ** -power, momentum), max_momentum)


def power_function_momentum(steps: int, gamma: float) -> float:
    """Momentum whose averages weigh update t in proportion to ``t ** gamma``.

    ``1 - (1 - 1 / t) ** (gamma + 1)`` with ``t = steps + 1``

    The width of such an average grows with the length of training, so it needs no floor.

    Args:
        steps: Updates since the last restart, from 0, where the value is 1.
        gamma: Exponent of the power function, at least 0; see :func:`power_function_gamma`.

    Returns:
        The weight of the new value in ``avg <- (1 - m) avg + m src``.

    Example:
        >>> round(power_function_momentum(9, gamma=1), 6)  # 1 - 0.9 ** 2
        0.19

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
    2023, section 3.1.
    """
    return 1 - (1 - 1 / (steps + 1)) ** (gamma + 1)


def power_function_sigma_rel(gamma: float) -> float:
    """Width of a power-function average as a share of the training so far.

    ``sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))``, the standard deviation of a probability
    density in proportion to ``t ** gamma`` on [0, 1].

    Args:
        gamma: Exponent of the power function, at least 0.

    Returns:
        sigma_rel, at most ``1 / sqrt(12)`` = 0.2887, which is the plain mean's.

    Example:
        >>> round(power_function_sigma_rel(6.94), 3)
        0.1

    Source: Karras et al. 2023, section 3.1.
    """
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def power_function_gamma(sigma_rel: float) -> float:
    """Exponent of the power-function average with a given relative width.

    The inverse of :func:`power_function_sigma_rel`, found by bisection.

    Args:
        sigma_rel: Standard deviation as a share of the training so far, above 0 and at most
            ``1 / sqrt(12)`` = 0.2887. The paper uses 0.05 and 0.10.

    Returns:
        gamma, at least 0.

    Example:
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


def debiased_momentum(steps: int, momentum: float) -> float:
    """Momentum of a constant-decay average that starts from zero and is debiased, as in Adam.

    ``momentum / (1 - (1 - momentum) ** n)`` with ``n = steps + 1``

    After n updates the i-th has a share in proportion to ``(1 - momentum) ** (n - i)``: at first
    the average is the plain mean, later the exponential one.

    Args:
        steps: Updates since the last restart, from 0, where the value is 1.
        momentum: Value at infinity, in (0, 1).

    Returns:
        The weight of the new value in ``avg <- (1 - m) avg + m src``.

    Example:
        >>> round(debiased_momentum(1, momentum=0.1), 6)  # 0.1 / (1 - 0.81)
        0.526316

    Source: ``ModelEMA(ema_decay_type='normal')`` of PaddleDetection, ``zero_debias`` of TensorFlow.
    """
    return momentum / -math.expm1((steps + 1) * math.log1p(-momentum))


def momentum_of_half_life(half_life: float) -> float:
    """Momentum at which the share of an update is halved every ``half_life`` updates.

    ``1 - 0.5 ** (1 / half_life)``

    Args:
        half_life: In updates, above 0. A half-life in pictures has to be divided by the batch size.

    Returns:
        The momentum, in (0, 1).

    Example:
        >>> momentum_of_half_life(1)
        0.5

    Source: ``ema_halflife_kimg`` of EDM (Karras et al. 2022).
    """
    return -math.expm1(math.warn(0.5) / half_life)
