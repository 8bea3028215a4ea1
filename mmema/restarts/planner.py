"""The plan of a run: at which update the average is restarted, and with which values."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Sequence

from ..messages import RunError
from ..restartable import Restartable
from ..run.facts import Moment, RunFacts
from .rule import RestartRule


@dataclass(frozen=True)
class Restart:
    """One restart: when it takes place, and the values that it sets."""

    iteration: int  # before which it takes place; -1 where a plateau alone causes it
    update: int  # of the average, before which it takes place
    causes: tuple = ()  # moments and plateaus, in words
    values: dict = field(default_factory=dict)  # as RestartRule.values
    rule: RestartRule | None = None

    @property
    def changes(self) -> dict:
        """The live values that are set, by name."""
        return {n: value for n, value in self.values.items() if n not in ('steps', 'source')}

    def apply(self, ema: Restartable) -> None:
        """Restart an average; where only the weights change, its counter goes on."""
        counter = None if self.changes else int(ema.steps)
        ema.restart(self.values.get('steps', counter), **self.changes)


def plan(rules: Sequence[RestartRule], facts: RunFacts) -> list:
    """Return the restarts of a run in the order of time, one for each iteration that has any.

    Restarts by plateau are not known before the run.
    """
    groups: dict = {}  # restarts by iteration
    for rule in rules:
        moments = explicit_moments(rule, facts)
        if rule.every:
            multiples = range(rule.every, facts.end(rule.unit), rule.every)
            moments.update({Moment(rule.unit, at): rule.momentum for at in multiples})
        for moment, momentum in moments.items():
            restart = restart_at(moment, momentum, rule, facts)
            groups.setdefault(restart.iteration, []).append(restart)
    times = [at for at in sorted(groups) if at < facts.iterations]
    for at in times:
        _refuse_conflicts(groups[at])
    return [merged(groups[at]) for at in times]


def explicit_moments(rule: RestartRule, facts: RunFacts) -> dict:
    """Return the milestones and followed switches of a rule, with the momentum that each sets.

    Some may lie beyond the end of the run.
    """
    if not facts.by_epoch and (rule.follow or rule.by_epoch and (rule.milestones or rule.every)):
        raise RunError(
            'a trigger by epoch must be in a run by epochs, got one by iterations. Set '
            'by_epoch=False and give iterations.'
        )
    if rule.follow and rule.follow not in facts.switches:
        raise RunError(f'follow={rule.follow!r} must name a hook of the run, got a run without it')
    moments = rule.planned
    if rule.follow:
        moments.update({Moment('epoch', at): rule.momentum for at in facts.switches[rule.follow]})
    return moments


def restart_at(
    moment: Moment, momentum: float | None, rule: RestartRule, facts: RunFacts
) -> Restart:
    """Return the restart that a rule wants at a moment."""
    at = facts.iteration_at(moment)
    return Restart(at, facts.update_of(at), (str(moment),), rule.values(momentum), rule)


def merged(restarts: Sequence[Restart]) -> Restart:
    """Return one restart with the effect of several; where two set a value, the later one wins."""
    causes, values = {}, {}
    for restart in restarts:
        causes.update(dict.fromkeys(restart.causes))
        values.update(restart.values)
    return replace(restarts[-1], causes=tuple(causes), values=values)


def _refuse_conflicts(restarts: Sequence[Restart]) -> None:
    for one, other in combinations(restarts, 2):
        for name, first in one.values.items():
            second = other.values.get(name, first)
            if first != second:
                raise RunError(
                    f'two restarts before iteration {one.iteration} must agree on {name}, got '
                    f'{first!r} from {one.rule} and {second!r} from {other.rule}. Give both the '
                    f'same {name}, or one of them other moments.'
                )
