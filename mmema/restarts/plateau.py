"""A metric that has stopped improving, as a trigger of restarts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..arguments import check_bool, check_choice, check_integer, check_number
from ..messages import RunError

SOURCES = ('model', 'ema', 'best')
_BELOW_ONE = 1 - 2**-53


@dataclass(frozen=True)
class Plateau:
    """The settings of a plateau trigger, checked.

    Args:
        metric: Its name as the evaluator gives it, for example ``'coco/bbox_mAP'``.
        patience: A restart is due after so many validations in a row without an improvement.
            Defaults to 1.
        rule: Which values are better, ``'greater'`` or ``'less'``. Defaults to ``'greater'``.
        momentum_add: Added to the momentum at each such restart. Defaults to None, nothing.
        max_momentum: The momentum is not raised beyond. Defaults to None, below 1.
        source: The weights that such a restart goes on from. Defaults to None, as the rule.
        after_restart: Whether only validations after the first restart of another kind are
            watched. Defaults to False.
    """

    metric: str
    patience: int = 1
    rule: str = 'greater'
    momentum_add: float | None = None
    max_momentum: float | None = None
    source: str | None = None
    after_restart: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise TypeError(f"on_plateau['metric'] must be a metric's name, got {self.metric!r}")
        check_integer("on_plateau['patience']", self.patience)
        check_choice("on_plateau['rule']", self.rule, ('greater', 'less'))
        for name in ('momentum_add', 'max_momentum'):
            value = getattr(self, name)
            if value is not None:
                check_number(f'on_plateau[{name!r}]', value)
                if not 0 < value < 1:
                    raise ValueError(f'on_plateau[{name!r}] must be in (0, 1), got {value}')
        if self.max_momentum is not None and self.momentum_add is None:
            raise ValueError(
                "on_plateau['max_momentum'] needs on_plateau['momentum_add'], got None for it"
            )
        if self.source is not None:
            check_choice("on_plateau['source']", self.source, SOURCES)
        check_bool("on_plateau['after_restart']", self.after_restart)

    @classmethod
    def of(cls, settings: dict) -> Plateau:
        """Return the trigger of a dict of settings; an error names ``on_plateau``."""
        if not isinstance(settings, dict):
            raise TypeError(f'on_plateau must be a dict, got {settings!r}')
        try:
            return cls(**settings)
        except TypeError as error:
            if '__init__' in str(error):
                raise TypeError(f'on_plateau: {str(error).split("__init__() ")[-1]}') from None
            raise

    def momentum_after(self, momentum: float) -> float | None:
        """Return the momentum that a restart sets, None if it leaves it alone."""
        if self.momentum_add is None:
            return None
        limit = _BELOW_ONE if self.max_momentum is None else self.max_momentum
        return max(momentum, min(momentum + self.momentum_add, limit))


@dataclass
class PlateauWatch:
    """Count of the validations in a row that did not improve a metric."""

    metric: str
    rule: str
    best: float | None = None
    without_improvement: int = 0

    def see(self, metrics: dict, patience: int, counting: bool) -> bool:
        """Take in the metrics of a validation; return whether a restart is due.

        After it, the comparison starts anew: the next validation counts as an improvement. Without
        any metric, as of a detector that finds nothing yet, nothing is compared.
        """
        if not metrics:
            return False
        if self.metric not in metrics:
            raise RunError(
                f"on_plateau['metric'] must be one of the run's metrics, got {self.metric!r}; "
                f'there are {sorted(metrics)}'
            )
        value, best = float(metrics[self.metric]), self.best
        sign = 1 if self.rule == 'greater' else -1
        if best is None or math.isnan(best) or sign * value > sign * best:
            self.best, self.without_improvement = value, 0
        elif counting:
            self.without_improvement += 1
        if self.without_improvement < patience:
            return False
        self.best, self.without_improvement = None, 0
        return True
