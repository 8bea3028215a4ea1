"""The plan of a run: at which update the average is restarted, and with which values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import Iterator, Sequence

from ..messages import RunError
from ..restartable import Restartable
from .facts import RunFacts
from .rule import Moment, RestartRule


@dataclass(frozen=True)
class Restart:
    """One restart: when it takes place, and the values that it sets.

    Args:
        iteration: The iteration before which it takes place.
        update: Index of the average's update before which it takes place.
        moments: The moments that cause it.
        metric: The metric that has stopped improving, where a plateau causes it.
        rule: The rule of the last of them.
        steps: The counter from then on; None where it goes on.
        momentum: The new momentum, None where it stays.
        gamma: The new gamma, None where it stays.
        source: The weights that training goes on from.
    """

    iteration: int
    update: int
    moments: tuple = ()
    metric: str | None = None
    rule: RestartRule | None = None
    steps: int | None = 0
    momentum: float | None = None
    gamma: float | None = None
    source: str = 'model'

    @property
    def changes(self) -> dict:
        """The live values that are set, by name."""
        values = {'momentum': self.momentum, 'gamma': self.gamma}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def causes(self) -> list:
        """Moments and plateau in words, for the log."""
        plateau = [] if self.metric is None else [f'{self.metric} stopped improving']
        return [*map(str, self.moments), *plateau]

    def apply(self, ema: Restartable) -> None:
        """Restart an average; where only the weights change, its counter goes on."""
        only_weights = self.steps is None and not self.changes
        ema.restart(int(ema.steps) if only_weights else self.steps, **self.changes)


def plan(rules: Sequence[RestartRule], facts: RunFacts) -> list:
    """Return the restarts of a run in the order of time, one for each iteration that has any.

    Restarts by plateau are not known before the run.

    Raises:
        RunError: If a rule does not fit the run, or two rules want different values at one
            iteration.
    """
    single = [restart for rule in rules for restart in _restarts_of(rule, facts)]
    single.sort(key=lambda restart: restart.iteration)
    planned = []
    for _, group in groupby(single, key=lambda restart: restart.iteration):
        restarts = list(group)
        _refuse_conflict(restarts)
        planned.append(merged(restarts))
    return planned


def _restarts_of(rule: RestartRule, facts: RunFacts) -> Iterator[Restart]:
    moments = explicit_moments(rule, facts)
    if rule.every:
        for at in range(rule.every, facts.end(rule.unit), rule.every):
            moments[Moment(rule.unit, at)] = rule.momentum
    for moment, momentum in moments.items():
        if facts.iteration_at(moment) < facts.iterations:
            yield restart_at(moment, momentum, rule, facts)


def explicit_moments(rule: RestartRule, facts: RunFacts) -> dict:
    """Return each milestone and followed switch of a rule, with the momentum that it sets.

    Some may lie beyond the end of the run.

    Raises:
        RunError: If the rule does not fit the run.
    """
    if not facts.by_epoch and (rule.follow or rule.by_epoch and (rule.milestones or rule.every)):
        raise RunError(
            'a trigger by epoch must be in a run by epochs, got one by iterations. Set '
            'by_epoch=False and give iterations.'
        )
    if rule.follow and rule.follow not in facts.switches:
        raise RunError(
            f'follow={rule.follow!r} must name a hook of the run, got {list(facts.hooks)}'
        )
    milestones = rule.milestones or ()
    momenta = rule.momenta if rule.one_momentum_each else rule.momenta * len(milestones)
    moments = {Moment(rule.unit, at): momentum for at, momentum in zip(milestones, momenta)}
    if rule.follow:
        moments.update({Moment('epoch', at): rule.momentum for at in facts.switches[rule.follow]})
    return moments


def restart_at(
    moment: Moment, momentum: float | None, rule: RestartRule, facts: RunFacts
) -> Restart:
    """Return the restart that a rule wants at a moment."""
    iteration = facts.iteration_at(moment)
    return Restart(
        iteration=iteration,
        update=facts.update_of(iteration),
        moments=(moment,),
        rule=rule,
        steps=rule.steps,
        momentum=momentum,
        gamma=rule.gamma,
        source=rule.source,
    )


def merged(restarts: Sequence[Restart]) -> Restart:
    """Return the one restart that does what several would do one after the other.

    A later one wins where it sets a value, by the order given; what it leaves alone is taken from
    the one before. The counter is left alone by ``steps=None``, the weights by ``source='model'``.
    """
    result = restarts[0]
    for after in restarts[1:]:
        result = replace(
            after,
            moments=tuple(dict.fromkeys(result.moments + after.moments)),
            metric=result.metric if after.metric is None else after.metric,
            steps=result.steps if after.steps is None else after.steps,
            momentum=result.momentum if after.momentum is None else after.momentum,
            gamma=result.gamma if after.gamma is None else after.gamma,
            source=result.source if after.source == 'model' else after.source,
        )
    return result


def _refuse_conflict(restarts: Sequence[Restart]) -> None:
    """Raise an error if two rules want different values at one iteration."""
    for name, unset in (('steps', None), ('momentum', None), ('gamma', None), ('source', 'model')):
        first = None
        for restart in restarts:
            value = getattr(restart, name)
            if value == unset:
                continue
            if first is not None and getattr(first, name) != value:
                raise RunError(
                    f'two restarts before iteration {restart.iteration} must agree on {name}, got '
                    f'{getattr(first, name)!r} from {first.rule} and {value!r} from '
                    f'{restart.rule}. Give both the same {name}, or one of them other moments.'
                )
            first = restart
