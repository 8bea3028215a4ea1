"""Profile of an average over a run: the momentum of each update and its share in the end."""

from __future__ import annotations

from collections import deque
from typing import Sequence

import numpy as np

from ..averaged import MomentumAveragedModel
from .planner import Restart


def momenta(
    ema: MomentumAveragedModel,
    updates: int,
    restarts: Sequence[Restart] = (),
    begin: int = 0,
) -> np.ndarray:
    """Return the momentum of every update of a run, in float64.

    The schedule of ``ema`` itself is asked, and the model is restarted on the way, so it is used
    up afterwards. 1 stands for a copy, 0 for an update that ``interval`` leaves out.

    Args:
        ema: An averaged model of mmema, of any layers, before its first update.
        updates: Number of updates, at least 0.
        restarts: The plan of the run, in the order of time. Defaults to none.
        begin: Updates before this one copy and are not counted, as EMAHook's ``begin_iter``.
            Defaults to 0.

    Returns:
        An array of ``updates`` values.

    Example:
        >>> import torch
        >>> from mmema import RestartableExpMomentumEMA
        >>> ema = RestartableExpMomentumEMA(torch.nn.Linear(1, 1), momentum=0.1, gamma=10)
        >>> momenta(ema, 4, [Restart(iteration=2, update=2, steps=0)]).round(4).tolist()
        [1.0, 0.8369, 1.0, 0.8369]
    """
    values = np.ones(updates)
    steps, ahead = int(ema.steps), deque(restarts)
    for i in range(updates):
        while ahead and ahead[0].update <= i:
            ema.steps.fill_(steps)
            ahead.popleft().apply(ema)
            steps = int(ema.steps)
        if i < begin:
            continue
        if steps:
            values[i] = 0.0 if steps % ema.interval else ema.momentum_at(steps)
        steps += 1
    return values


def shares(momenta: np.ndarray) -> np.ndarray:
    """Return the weight that the source at each update has in the average after the last one.

    ``share_i = m_i * prod_{j > i} (1 - m_j)``

    A hard restart copies (``m = 1``), which leaves nothing of all before. The shares sum to one if
    there is a copy.

    Args:
        momenta: The momentum of each update, as :func:`momenta` gives them.

    Returns:
        An array of as many values, float64.

    Example:
        >>> shares(np.array([1.0, 0.5, 0.25])).tolist()
        [0.375, 0.375, 0.25]
    """
    momenta = np.asarray(momenta, dtype=np.float64)
    kept_by_later = np.cumprod((1 - momenta)[::-1])[::-1]
    return momenta * np.append(kept_by_later[1:], 1.0)[: len(momenta)]


def share_of_blocks(shares: np.ndarray, length: int) -> np.ndarray:
    """Return the sums of ``shares`` over blocks of ``length`` updates, such as epochs."""
    return np.add.reduceat(shares, np.arange(0, len(shares), length))
