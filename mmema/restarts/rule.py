"""The rule of one restart hook: when it restarts, and with which values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

from ..arguments import check_bool, check_choice, check_integer, check_momentum, check_positive
from ..run.facts import Moment
from ..run.switches import SWITCH_HOOKS
from .plateau import SOURCES, Plateau


@dataclass(frozen=True)
class RestartRule:
    """The arguments of :class:`mmema.EMARestartHook`, checked; they are explained there.

    A rule knows neither a run nor an average, so one run can follow several.
    """

    milestones: Sequence[int] | None = None
    every: int | None = None
    by_epoch: bool = True
    follow: str | None = None
    on_plateau: dict | None = None
    steps: int | None = 0
    momentum: float | Sequence[float] | None = None
    gamma: float | None = None
    source: str = 'model'

    def __post_init__(self) -> None:
        milestones = () if self.milestones is None else self.milestones
        if not isinstance(milestones, (list, tuple)):
            raise TypeError(f'milestones must be a list of integers, got {milestones!r}')
        for at in milestones:
            check_integer('a milestone', at)
        if list(milestones) != sorted(set(milestones)):
            raise ValueError(f'milestones must rise, got {milestones}')
        if self.every is not None:
            check_integer('every', self.every)
        check_bool('by_epoch', self.by_epoch)
        if self.follow is not None:
            check_choice('follow', self.follow, SWITCH_HOOKS)
        plateau, planned = self.plateau, bool(milestones or self.every or self.follow)
        if not planned and plateau is None:
            raise ValueError(
                'EMARestartHook must have a trigger, got none of milestones, every, follow and '
                'on_plateau'
            )
        if plateau and plateau.after_restart and not planned:
            raise ValueError(
                "on_plateau['after_restart'] must come with another trigger, got none: nothing "
                'would ever begin it'
            )
        if self.steps is not None:
            check_integer('steps', self.steps, least=0)
        for value in self.momenta:
            if value is not None:
                check_momentum(value)
        number = len(self.momenta)
        alone = number == len(milestones) and not (self.every or self.follow)
        if isinstance(self.momentum, (list, tuple)) and not alone:
            raise ValueError(
                'a list of momentum must have one value for each milestone, and no other trigger '
                f'but on_plateau, got {number} values for {len(milestones)} milestones'
            )
        if self.gamma is not None:
            check_positive('gamma', self.gamma)
        check_choice('source', self.source, SOURCES)
        if planned and not any(self.values(momentum) for momentum in self.momenta):
            raise ValueError(
                'a restart with steps=None must change momentum, gamma or source, got none of them'
            )
        if plateau and not self.values_on_plateau(0.5):
            raise ValueError(
                'a restart on a plateau with steps=None must change momentum (one value, or '
                'momentum_add), gamma or source, got none of them'
            )

    @property
    def plateau(self) -> Plateau | None:
        return None if self.on_plateau is None else Plateau.of(self.on_plateau)

    @property
    def momenta(self) -> list:
        """The momentum of each milestone where they differ, else the only one; None if unset."""
        return list(self.momentum) if isinstance(self.momentum, (list, tuple)) else [self.momentum]

    @property
    def planned(self) -> dict:
        """The milestones as moments, each with the momentum that it sets."""
        milestones = self.milestones or ()
        momenta = self.momenta if len(self.momenta) > 1 else self.momenta * len(milestones)
        return {Moment(self.unit, at): momentum for at, momentum in zip(milestones, momenta)}

    @property
    def unit(self) -> str:
        return 'epoch' if self.by_epoch else 'iter'

    def values(self, momentum: float | None, source: str | None = None) -> dict:
        """Return the values that a restart sets by name, without those that it leaves alone."""
        values = {'steps': self.steps, 'momentum': momentum, 'gamma': self.gamma}
        if (source or self.source) != 'model':
            values['source'] = source or self.source
        return {name: value for name, value in values.items() if value is not None}

    def values_on_plateau(self, momentum: float) -> dict:
        """Return the values that a restart on a plateau sets for an average of this momentum.

        A list of momenta is one of milestones.
        """
        new = self.plateau.momentum_after(momentum)
        if new is None and not isinstance(self.momentum, (list, tuple)):
            new = self.momentum
        return self.values(new, self.plateau.source)

    @property
    def uses_best(self) -> bool:
        """Whether a restart can go back to the best checkpoint."""
        return 'best' in (self.source, self.plateau and self.plateau.source)

    @property
    def key(self) -> str:
        """The arguments as text, by which a checkpoint knows the rule."""
        return repr(tuple(vars(self).values()))

    def __str__(self) -> str:
        given = {n: v for n, v in vars(self).items() if v != getattr(RestartRule, n)}
        return f'EMARestartHook({", ".join(f"{name}={value!r}" for name, value in given.items())})'
