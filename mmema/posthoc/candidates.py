"""Averages of a run that are worth an evaluation: restarted, of other horizons, means."""

from __future__ import annotations

from typing import NamedTuple, Sequence

import numpy as np

from ..run import MAIN
from . import derive
from .history import average_config
from .profiles import Fit, Stored, blends_of, exponential, uniform

FACTORS = (0.5, 2, 4, 8)  # of the momentum of the run's main average
LAST = (2, 3, 5, 10)  # checkpoints, of a mean of their raw weights
LARGEST = 0.5  # momentum: a horizon of two updates
HORIZON = 0.1  # of the updates of the run, where no average tells one


class Candidate(NamedTuple):
    """An average to evaluate: stored weights as they are, or the mixture nearest to a profile."""

    label: str
    stored: Sequence[Stored]
    wanted: np.ndarray | None = None  # None: the only stored one, as it is
    record: dict = {}
    fit: Fit | None = None  # the mixture, once it is solved for

    def solved(self) -> Candidate:
        """Return it with its mixture; raise CheckpointError if none is near enough."""
        if self.wanted is None:
            return self
        return self._replace(fit=derive.nearest(self.stored, self.wanted))

    def made(self, trust: bool = False) -> derive.Made:
        """Make the weights; raise CheckpointError if that cannot be."""
        if self.wanted is None:
            return derive.taken(self.stored[0], trust)
        made, _ = derive.fit(self.stored, self.wanted, self.record, trust=trust, found=self.fit)
        return made


def candidates(stored: Sequence[Stored], restarts: Sequence[int]) -> list[Candidate]:
    """Return the averages to compare.

    These are all weights of the last checkpoint as they are; the main average with shorter and
    longer horizons, and each as if restarted at some epochs; the plain mean since each of these;
    and the means of the raw weights of the last checkpoints. All but the last are blended at the
    updates at which the main average was, so that a momentum means the same for both.

    Args:
        stored: All weights of the run's checkpoints; see :func:`stored_profiles`.
        restarts: Epochs (iterations of a run by iterations), as milestones of EMARestartHook.
    """
    last, total = stored[-1].facts, stored[-1].total
    run, momentum, blends = last.run, _momentum(stored), blends_of(stored)
    found = [Candidate(one.weights, [one]) for one in stored if one.facts is last]
    for begin in (None, *restarts):
        start = 0 if begin is None else last.iteration_of(begin)
        if not (blends.at >= start).any():
            continue
        unit = 'epoch' if run.by_epoch else 'iteration'
        since = '' if begin is None else f', restarted at {unit} {begin}'
        for factor in sorted({1, *FACTORS}):
            value = momentum * factor
            if value > LARGEST or begin is None and factor == 1:  # as it is
                continue
            record = {'momentum': value, 'restart_at': begin}
            wanted = exponential(value, None, start, total, blends)
            found.append(Candidate(f'momentum {value:.4g}{since}', stored, wanted, record))
        if begin is not None:
            record = {'uniform': begin}
            label = f'mean of all updates from {unit} {begin} on'
            found.append(Candidate(label, stored, uniform(start, total, blends), record))
    raw = [one for one in stored if one.weights == 'raw']
    for number in LAST:
        if number <= len(raw):
            own = raw[-number:]
            wanted = np.mean([one.profile() for one in own], axis=0)
            label = f'mean of the last {number} raw weights'
            found.append(Candidate(label, own, wanted, {'of': [str(one) for one in own]}))
    return found


def _momentum(stored: Sequence[Stored]) -> float:
    """Return the momentum of the main average; without one, that of a tenth of the run."""
    for one in reversed(stored):
        if one.weights == MAIN:
            live, config = one.facts.averages[MAIN].live, average_config(one.facts, MAIN)
            # In the end, that of a schedule without one, such as a mean's, is as good.
            at_the_end = float(one.momenta[one.momenta > 0][-1])
            return live.get('momentum', config.get('momentum', at_the_end))
    return 1 / max(HORIZON * stored[-1].total, 1)
