"""State of a restart rule during a run: which of its moments are done, and which are due."""

from __future__ import annotations

from typing import Sequence

from .facts import RunFacts
from .live import on_main
from .planner import Restart, explicit_moments, merged, restart_at
from .plateau import PlateauWatch
from .rewind import kept_names
from .rule import Moment, RestartRule


class RuleProgress:
    """State of a rule in a run, of a size that does not grow with the run.

    A moment is due from its time on until it is done, so a run that is resumed past it restarts at
    once. Milestones and switches are remembered one by one, of ``every`` the last multiple.

    Args:
        rule: The rule.
    """

    def __init__(self, rule: RestartRule) -> None:
        self.rule = rule
        self.watch = None if rule.plateau is None else PlateauWatch(rule.plateau)
        self.done: list = []
        self.plateau_due = False
        self.kept: list = []  # names of kept best checkpoints; plateaus go back to the last
        self.validated: int | None = None  # when the last validation was, in the loop's time
        self.just_resumed = False
        self._moments: dict = {}  # explicit ones, with the momentum that each sets
        self._next: dict = {}  # time of the next moment by unit

    def begin(self, facts: RunFacts) -> None:
        """Take in the facts of the run that begins or goes on.

        Raises:
            RunError: If the rule does not fit the run.
        """
        self._facts = facts
        self._moments = explicit_moments(self.rule, facts)
        self._look_ahead()

    def is_due(self, now: dict) -> bool:
        """Tell whether to restart at the current ``epoch`` and ``iter``."""
        return self.plateau_due or any(now[unit] >= at for unit, at in self._next.items())

    def take_due(self, now: dict, momentum: float) -> list:
        """Return the due restarts, and mark them done; a plateau gives way to a moment.

        Args:
            now: The current ``epoch`` and ``iter``.
            momentum: The average's momentum, to which a plateau adds.
        """
        rule, plateau = self.rule, self.rule.plateau if self.plateau_due else None
        due = {m: v for m, v in self._moments.items() if now[m.unit] >= m.at and m not in self.done}
        if rule.every:
            last = min(now[rule.unit], self._facts.end(rule.unit) - 1) // rule.every * rule.every
            if last > self._last_multiple():
                due[Moment(rule.unit, last)] = rule.momentum
        self.done += due
        self.plateau_due = False
        self._look_ahead()
        if plateau is None or due:
            return [restart_at(moment, value, rule, self._facts) for moment, value in due.items()]
        value, source = plateau.momentum_after(momentum), plateau.source or rule.source
        why = (f'{plateau.metric} stopped improving',)
        return [Restart(-1, -1, why, rule, rule.steps, value, rule.gamma, source)]

    def _look_ahead(self) -> None:
        """Forget all but the last multiple of ``every``; note the next moment of each unit."""
        latest = {}
        for moment in sorted(self.done, key=lambda moment: moment.at):
            if moment not in self._moments:  # a multiple, or from a config that was changed
                latest[moment.unit, self._is_multiple(moment)] = moment
        self.done = [m for m in self.done if m in self._moments] + list(latest.values())
        ahead = [moment for moment in self._moments if moment not in self.done]
        if self.rule.every:
            multiple = self._last_multiple() + self.rule.every
            if multiple < self._facts.end(self.rule.unit):
                ahead.append(Moment(self.rule.unit, multiple))
        self._next = {}
        for moment in ahead:
            self._next[moment.unit] = min(moment.at, self._next.get(moment.unit, moment.at))

    def _last_multiple(self) -> int:
        """Return the last multiple of ``every`` that is done, 0 if none is."""
        return max((m.at for m in self.done if self._is_multiple(m)), default=0)

    def _is_multiple(self, moment: Moment) -> bool:
        rule = self.rule
        return bool(rule.every) and moment.unit == rule.unit and moment.at % rule.every == 0

    def see_validation(self, metrics: dict, now: int) -> None:
        """Take in the metrics of a validation; rank 0 decides about a plateau for all ranks."""
        self.validated = now
        if self.watch is not None:
            counting = bool(self.done) or not self.rule.plateau.after_restart
            self.plateau_due |= on_main(lambda: self.watch.see(metrics, counting))

    def state_dict(self) -> dict:
        """Return the state for a checkpoint, of plain values."""
        return {
            'arguments': self.rule.key,
            'done': [str(moment) for moment in self.done],
            'plateau_due': self.plateau_due,
            'plateau': self.watch.state_dict() if self.watch else None,
            'kept': list(self.kept),
            'validated': self.validated,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over a state; one of mmema 0.1.0 lists every moment that is done."""
        self.done = [Moment.parse(text) for text in state['done']]
        self.plateau_due = state['plateau_due']
        self.kept = kept_names(state)
        self.validated = state.get('validated')
        self.just_resumed = True
        if self.watch and state['plateau']:
            self.watch.load_state_dict(state['plateau'])


def due_restart(progresses: Sequence[RuleProgress], now: dict, momentum: float) -> Restart:
    """Return one restart for all that is due by these rules, and mark it done.

    Args:
        progresses: The states of rules of one average; at least one is due.
        now: The current ``epoch`` and ``iter``.
        momentum: The average's momentum.
    """
    due = [restart for progress in progresses for restart in progress.take_due(now, momentum)]
    return merged(sorted(due, key=lambda restart: restart.iteration))
