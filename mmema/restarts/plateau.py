"""A metric that has stopped improving, as a trigger of restarts."""

from __future__ import annotations

import math

from ..arguments import count, flag, one_of, real
from .rewind import SOURCES

_BELOW_ONE = 1 - 2**-53


class Plateau:
    """Counts the validations that did not improve a metric.

    Args:
        metric: Its name as the evaluator gives it, for example ``'coco/bbox_mAP'``.
        patience: A restart is due after so many validations in a row without an improvement.
            Defaults to 1.
        rule: ``'greater'`` or ``'less'``: what is better. Defaults to ``'greater'``.
        momentum_add: Added to the momentum at each such restart. Defaults to None, nothing.
        max_momentum: The momentum is not raised beyond. Defaults to None, below 1.
        source: What such a restart goes on from. Defaults to None, what the hook's does.
        after_restart: Whether only what comes after the hook's first restart of another kind is
            watched. Defaults to False.
    """

    def __init__(
        self,
        metric: str,
        patience: int = 1,
        rule: str = 'greater',
        momentum_add: float | None = None,
        max_momentum: float | None = None,
        source: str | None = None,
        after_restart: bool = False,
    ):
        if not isinstance(metric, str) or not metric:
            raise TypeError(f"on_plateau['metric'] must be a metric's name, got {metric!r}")
        self.metric = metric
        self.patience = count("on_plateau['patience']", patience)
        self.rule = one_of("on_plateau['rule']", rule, ('greater', 'less'))
        for name, value in (('momentum_add', momentum_add), ('max_momentum', max_momentum)):
            if value is not None and not 0 < real(f'on_plateau[{name!r}]', value) < 1:
                raise ValueError(f'on_plateau[{name!r}] must be in (0, 1), got {value}')
        if max_momentum is not None and momentum_add is None:
            raise ValueError(
                "on_plateau['max_momentum'] needs on_plateau['momentum_add'], got None for it"
            )
        self.momentum_add = momentum_add
        self.max_momentum = max_momentum
        if source is not None:
            one_of("on_plateau['source']", source, SOURCES)
        self.source = source
        self.after_restart = flag("on_plateau['after_restart']", after_restart)
        self.best: float | None = None
        self.without_improvement = 0

    def watch(self, metrics: dict, counting: bool) -> bool:
        """Take in the metrics of a validation; return whether a restart is due.

        After it, the comparison starts anew: the next validation counts as an improvement. Without
        any metric, as of a detector that finds nothing yet, nothing is compared.
        """
        if not metrics:
            return False
        if self.metric not in metrics:
            raise ValueError(
                f"on_plateau['metric'] must be one of the run's metrics, got {self.metric!r}; "
                f'there are {sorted(metrics)}'
            )
        value = float(metrics[self.metric])
        if self._improves(value):
            self.best, self.without_improvement = value, 0
        elif counting:
            self.without_improvement += 1
        due = self.without_improvement >= self.patience
        if due:
            self.best, self.without_improvement = None, 0
        return due

    def _improves(self, value: float) -> bool:
        if self.best is None or math.isnan(self.best):
            return True
        return value > self.best if self.rule == 'greater' else value < self.best

    def momentum_after(self, momentum: float) -> float | None:
        """Return the momentum that a restart sets, None if it leaves it alone."""
        if self.momentum_add is None:
            return None
        limit = _BELOW_ONE if self.max_momentum is None else self.max_momentum
        return max(momentum, min(momentum + self.momentum_add, limit))

    def state_dict(self) -> dict:
        return {
            'metric': self.metric,
            'rule': self.rule,
            'best': self.best,
            'without_improvement': self.without_improvement,
        }

    def load_state_dict(self, state: dict) -> None:
        if (state['metric'], state['rule']) == (self.metric, self.rule):
            self.best, self.without_improvement = state['best'], state['without_improvement']


def plateau_of(settings) -> Plateau:
    if not isinstance(settings, dict):
        raise TypeError(f'on_plateau must be a dict, got {settings!r}')
    try:
        return Plateau(**settings)
    except TypeError as error:
        if '__init__' in str(error):
            raise TypeError(f'on_plateau: {str(error).split("__init__() ")[-1]}') from None
        raise
