"""State of a restart rule during a run: which of its moments are done, and which are due."""

from __future__ import annotations

from dataclasses import asdict
from itertools import repeat
from typing import Sequence

from ..run.facts import Moment, RunFacts
from .planner import Restart, explicit_moments, merged, restart_at
from .plateau import PlateauWatch
from .ranks import on_main
from .rewind import kept_names
from .rule import RestartRule


class RuleProgress:
    """State of a rule in a run.

    A moment is due from its time on until it is done, so a run that is resumed past it restarts at
    once. Milestones and switches are remembered one by one, of ``every`` the last multiple.
    """

    def __init__(self, rule: RestartRule) -> None:
        self.rule, plateau = rule, rule.plateau
        self.watch = plateau and PlateauWatch(plateau.metric, plateau.rule)
        self.done: dict = {}  # moments in the order in which they were done, at which iteration
        self.plateau_due = False
        self.kept: list = []  # names of kept best checkpoints; plateaus go back to the last
        self.validated: int | None = None  # when the last validation was, in the loop's time
        self.just_resumed = False

    def begin(self, facts: RunFacts) -> None:
        """Take in the facts of the run that begins or goes on; a rule must fit it."""
        self._facts = facts
        self._moments = explicit_moments(self.rule, facts)

    def is_due(self, now: dict) -> bool:
        """Tell whether to restart at the current ``epoch`` and ``iter``."""
        return self.plateau_due or bool(self._due(now))

    def _due(self, now: dict) -> dict:
        """Return the moments that are due, with the momentum that each sets."""
        rule, due = self.rule, {}
        for moment, momentum in self._moments.items():
            if now[moment.unit] >= moment.at and moment not in self.done:
                due[moment] = momentum
        if rule.every:
            last = now[rule.unit] // rule.every * rule.every
            if last > 0 and Moment(rule.unit, last) not in self.done:
                due[Moment(rule.unit, last)] = rule.momentum
        return due

    def take_due(self, now: dict, momentum: float) -> list:
        """Return the due restarts, and mark them done; a plateau gives way to a moment."""
        rule, due = self.rule, self._due(now)
        if due:
            restarts = [restart_at(at, value, rule, self._facts) for at, value in due.items()]
        else:
            cause, values = rule.plateau.metric, rule.values_on_plateau(momentum)
            restarts = [Restart(-1, -1, (f'{cause} stopped improving',), values, rule)]
        self.done.update(dict.fromkeys(due, now['iter']))
        self.plateau_due = False
        if rule.every:  # the last multiple stands for all, so that the state does not grow
            others = [m for m in self.done if m not in self._moments and m.unit == rule.unit]
            multiples = sorted(m.at for m in others if m.at % rule.every == 0)
            for at in multiples[:-1]:
                del self.done[Moment(rule.unit, at)]
        return restarts

    def see_validation(self, metrics: dict, now: int) -> None:
        """Take in the metrics of a validation; rank 0 decides about a plateau for all ranks."""
        self.validated = now
        plateau = self.rule.plateau
        if plateau is not None:
            counting = bool(self.done) or not plateau.after_restart
            self.plateau_due |= on_main(lambda: self.watch.see(metrics, plateau.patience, counting))

    def state_dict(self) -> dict:
        return {
            'arguments': self.rule.key,
            'done': [str(moment) for moment in self.done],
            'done_at': [*self.done.values()],
            'plateau_due': self.plateau_due,
            'plateau': self.watch and asdict(self.watch),
            'kept': list(self.kept),
            'validated': self.validated,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over a state; one of mmema 0.1.0 lists every moment that is done, without times."""
        self.done = dict(zip(map(Moment.parse, state['done']), state.get('done_at', repeat(None))))
        self.plateau_due = state['plateau_due']
        self.kept = kept_names(state)
        self.validated = state.get('validated')
        self.just_resumed = True
        saved, watch = state['plateau'], self.watch
        if saved and watch and (saved['metric'], saved['rule']) == (watch.metric, watch.rule):
            self.watch = PlateauWatch(**saved)


def due_restart(progresses: Sequence[RuleProgress], now: dict, momentum: float) -> Restart:
    """Return one restart for all that is due by these rules, and mark it done.

    Each of them is due; a plateau adds to the average's ``momentum``.
    """
    due = [restart for progress in progresses for restart in progress.take_due(now, momentum)]
    return merged(sorted(due, key=lambda restart: restart.iteration))
