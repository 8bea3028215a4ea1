"""Profile of an average over a run: the momentum of each update and its share in the end."""

from __future__ import annotations

from collections import deque
from typing import Sequence

import numpy as np

from ..averaged import MomentumAveragedModel
from .planner import Restart


def momenta(
    ema: MomentumAveragedModel, updates: int, restarts: Sequence[Restart] = (), begin: int = 0
) -> np.ndarray:
    """Return the momentum of every update of a run: 1 for a copy, 0 where ``interval`` skips it.

    Args:
        ema: An average, of any layers, before the first of these updates. It is restarted on the
            way, and its counter is left where they leave it; its weights stay.
        updates: Number of updates.
        restarts: The plan of the run, in the order of time.
        begin: Updates before this one copy and are not counted, as EMAHook's ``begin_iter``.
    """
    values, steps, ahead = np.ones(updates), int(ema.steps), deque(restarts)
    for i in range(begin, updates):
        while ahead and ahead[0].update <= i:
            ema.steps.fill_(steps)
            ahead.popleft().apply(ema)
            steps = int(ema.steps)
        if steps and not ema.record.copy_is_due:
            values[i] = 0.0 if steps % ema.interval else ema.momentum_at(steps)
        ema.record.copy_is_due = False
        steps += 1
    ema.steps.fill_(steps)
    return values


def shares(momenta: np.ndarray) -> np.ndarray:
    """Return the weight that the source at each update has in the average after the last one.

    ``share_i = m_i * prod_{j > i} (1 - m_j)``, so a copy (``m = 1``) leaves nothing of all before.
    """
    kept_by_later = np.cumprod((1 - momenta)[:0:-1])[::-1]
    return momenta * np.append(kept_by_later, 1.0)
