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
