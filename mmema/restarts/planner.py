"""The plan of a run: at which update the average is restarted, and with which values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import Sequence

from ..messages import RunError
from ..restartable import Restartable
from .facts import RunFacts
from .rule import Moment, RestartRule


@dataclass(frozen=True)
class Restart:
    """One restart: when it takes place, and the values that it sets."""

    iteration: int  # before which it takes place; -1 where a plateau alone causes it
    update: int  # of the average, before which it takes place
    causes: tuple = ()  # moments and plateaus, in words
    rule: RestartRule | None = None
    steps: int | None = 0  # None: the counter goes on
    momentum: float | None = None  # None: it stays
    gamma: float | None = None
    source: str = 'model'

    @property
    def changes(self) -> dict:
        """The live values that are set, by name."""
        values = {'momentum': self.momentum, 'gamma': self.gamma}
        return {name: value for name, value in values.items() if value is not None}

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
    restarts = []
    for rule in rules:
        moments = explicit_moments(rule, facts)
        if rule.every:
            for at in range(rule.every, facts.end(rule.unit), rule.every):
                moments[Moment(rule.unit, at)] = rule.momentum
        restarts += [
            restart_at(moment, momentum, rule, facts)
            for moment, momentum in moments.items()
            if facts.iteration_at(moment) < facts.iterations
        ]
    restarts.sort(key=lambda restart: restart.iteration)
    groups = [list(group) for _, group in groupby(restarts, key=lambda restart: restart.iteration)]
    for group in groups:
        _refuse_conflict(group)
    return [merged(group) for group in groups]


def explicit_moments(rule: RestartRule, facts: RunFacts) -> dict:
    """Return the milestones and followed switches of a rule, with the momentum that each sets.

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
        raise RunError(f'follow={rule.follow!r} must name a hook of the run, got a run without it')
    milestones = rule.milestones or ()
    momenta = rule.momenta if len(rule.momenta) > 1 else rule.momenta * len(milestones)
    moments = {Moment(rule.unit, at): momentum for at, momentum in zip(milestones, momenta)}
    if rule.follow:
        moments.update({Moment('epoch', at): rule.momentum for at in facts.switches[rule.follow]})
    return moments


def restart_at(
    moment: Moment, momentum: float | None, rule: RestartRule, facts: RunFacts
) -> Restart:
    """Return the restart that a rule wants at a moment."""
    at = facts.iteration_at(moment)
    return Restart(
        at, facts.update_of(at), (str(moment),), rule, rule.steps, momentum, rule.gamma, rule.source
    )


def merged(restarts: Sequence[Restart]) -> Restart:
    """Return one restart with the effect of several, one after the other.

    A later one wins where it sets a value, by the order given; a value that it leaves alone is
    taken from the one before. The counter is left alone by ``steps=None``, the weights by
    ``source='model'``.
    """
    result = restarts[0]
    for after in restarts[1:]:
        kept = {name: getattr(result, name) for name in _UNSET if not _sets(after, name)}
        result = replace(after, causes=tuple(dict.fromkeys(result.causes + after.causes)), **kept)
    return result


_UNSET = {'steps': None, 'momentum': None, 'gamma': None, 'source': 'model'}


def _sets(restart: Restart, name: str) -> bool:
    return getattr(restart, name) != _UNSET[name]


def _refuse_conflict(restarts: Sequence[Restart]) -> None:
    """Raise an error if two restarts of one iteration set different values."""
    for name in _UNSET:
        first, *others = [restart for restart in restarts if _sets(restart, name)] or [None]
        for other in others:
            one, two = getattr(first, name), getattr(other, name)
            if one != two:
                raise RunError(
                    f'two restarts before iteration {other.iteration} must agree on {name}, got '
                    f'{one!r} from {first.rule} and {two!r} from {other.rule}. Give both the same '
                    f'{name}, or one of them other moments.'
                )
