"""The ladder of a run: its rungs, the choice at each validation, and the log of it."""

from __future__ import annotations

import math
from typing import Callable, Iterable, Mapping, Sequence

from ..messages import RunError, aligned, inform, listed, warn
from ..run import RunFacts
from ..run.horizons import AUTO, RAW, Rung, updates_of_horizon
from ..run.metrics import Watched, saved_metrics, watched_metric
from .ladder import Climb

KEPT_SHARE = AUTO[len(AUTO) // 2]  # of the rung that is chosen before the first validation


class LadderChoice:
    """The choice of a run among the raw weights and the rungs of its ladder.

    Args:
        rungs: The rungs, the shortest first once the run is known.
        is_auto: Whether they are those of ``horizon='auto'``: then rungs that are too short for
            the run are left out.
        evaluates_all: Whether a validation looks at all weights rather than at the chosen ones and
            their neighbours.
    """

    def __init__(self, rungs: Sequence[Rung], is_auto: bool, evaluates_all: bool):
        self.is_auto = is_auto
        self.evaluates_all = evaluates_all
        self.updates: dict[str, float] = {}  # the horizons in updates of the run
        self.scores: dict[str, list] = {}  # (time, score) pairs by name
        self.measured: dict[str, None] = {}  # names of the metrics so far, in order
        self.validated: int | None = None  # when the last validation was, in the loop's time
        self.just_resumed = False
        self._said_no_direction = False
        self._begin(rungs)

    def _begin(self, rungs: Sequence[Rung], chosen: str | None = None) -> None:
        self.rungs = {rung.name: rung for rung in rungs}
        names = list(self.rungs)
        first = names[(len(names) - 1) // 2]
        if self.is_auto:
            first = next(
                (n for n, r in self.rungs.items() if float(r.horizon) >= KEPT_SHARE), names[-1]
            )
        self.climb = Climb([RAW, *names], chosen if chosen in [RAW, *names] else first)

    @property
    def chosen(self) -> str:
        """The name of the chosen weights."""
        return self.climb.chosen

    def fit(self, facts: RunFacts) -> None:
        """Order the rungs by their horizons in a run; raise RunError if they do not fit it."""
        rungs = dict(self.rungs)
        updates = {name: updates_of_horizon(rung.horizon, facts) for name, rung in rungs.items()}
        if self.is_auto:
            short = [name for name in rungs if updates[name] <= 1]
            if len(short) == len(rungs):
                raise RunError(
                    f"horizon='auto' must have a run of at least 4 updates, got {facts.updates}"
                )
            if short:
                inform(
                    f'EMAHook: {listed(short)} of the ladder are left out: of {facts.updates} '
                    'updates they are no more than one, the raw weights'
                )
            rungs = {name: rung for name, rung in rungs.items() if name not in short}
        for name, rung in rungs.items():
            if not 1 < updates[name] < facts.updates:
                raise RunError(
                    'a horizon of a ladder must be longer than one update and shorter than the run '
                    f'of {facts.updates}, but {rung.horizon!r} is {updates[name]:g}'
                )
        ordered = sorted(rungs, key=updates.__getitem__)
        for one, other in zip(ordered, ordered[1:]):
            if updates[one] == updates[other]:
                raise RunError(
                    f'the horizons of a ladder must differ, but {rungs[one].horizon!r} and '
                    f'{rungs[other].horizon!r} are both {updates[one]:g} updates of this run'
                )
        self.updates = {name: updates[name] for name in ordered}
        # A file that was loaded before has chosen already.
        self._begin([rungs[name] for name in ordered], self.chosen if self.just_resumed else None)
        inform(
            f'EMAHook: averages of {", ".join(self.described(name) for name in ordered)} beside '
            f'the raw weights; shares are of the {facts.updates} updates that this run has if '
            f'nothing stops it before. Until the first validation the average of '
            f'{self.described(self.chosen)} is chosen.'
        )

    def described(self, name: str) -> str:
        """Return a rung's horizon in words."""
        known = name in self.updates
        return str(self.rungs[name]) + (f' ({self._updates(name)} updates)' if known else '')

    def _updates(self, name: str) -> str:
        updates = self.updates.get(name)
        return '-' if updates is None else f'{updates:.1f}' if updates < 10 else f'{updates:.0f}'

    # --- validations ------------------------------------------------------------------------------

    def choose(
        self,
        metrics: dict,
        metrics_of: Callable[[str], dict],
        hooks: Iterable,
        now: int,
        last: bool,
    ) -> dict:
        """Choose by a validation of the chosen weights and of others; return the winner's metrics.

        The scores of all weights that were looked at follow, with their names as prefixes.

        Args:
            metrics: Those of the chosen weights.
            metrics_of: Evaluates other weights by name.
            hooks: Of the run; their ``save_best`` tells the metric.
            now: The time of the validation.
            last: Whether it is the last of the run.
        """
        before, results = self.chosen, {self.chosen: metrics}
        scores: dict[str, float] = {}
        watched = Watched(None)
        self.validated = now

        def score_of(name: str) -> float | None:
            nonlocal watched
            if name not in results:
                results[name] = metrics_of(name)
            self.measured.update(dict.fromkeys(results[name]))
            watched = self._watched(hooks)
            value = results[name].get(watched.metric)
            if value is None:
                return None
            scores[name] = float(value)
            return -scores[name] if watched.less else scores[name]

        score_of(before)
        if watched.metric is not None and watched.less is None:
            self._say_no_direction(watched.metric)
        else:
            self.climb.see(score_of, last, self.evaluates_all)
        seen = {name: scores[name] for name in self.climb.names if name in scores}
        for name, score in seen.items():
            self.scores[name] = [*self.scores.get(name, []), (now, score)]
        if self.chosen != before:
            inform(self._moved(before, seen))
        winner = results[self.chosen]
        if not winner:
            return winner
        others = {f'{name}/{watched.metric}': score for name, score in seen.items()}
        return {**winner, **others}

    def _watched(self, hooks: Iterable) -> Watched:
        prefixes = [f'{name}/' for name in self.climb.names]
        declared = saved_metrics(hooks, prefixes)
        return watched_metric(hooks, [*declared, *self.measured], prefixes)

    def _say_no_direction(self, metric: str) -> None:
        if not self._said_no_direction:
            self._said_no_direction = True
            warn(
                f'EMAHook: nothing is chosen, since nothing says whether more of {metric!r} is '
                f"better: set save_best={metric!r} and rule='greater' or 'less' in the "
                f'CheckpointHook. Until then the average of {self.described(self.chosen)} is kept.'
            )

    def _moved(self, before: str, scores: Mapping[str, float]) -> str:
        name = 'the raw weights are'
        if self.chosen != RAW:
            rung, updates = self.rungs[self.chosen], self._updates(self.chosen)
            name = f'the average of {rung}, {updates} updates, is'
        old = f'{scores[before]:.4g}' if before in scores else 'no score'
        return f'{name} ahead: {scores[self.chosen]:.4g} against {old}; chosen from now on'

    def table(self) -> str:
        """Return the last score of each of the weights as lines of text, the longest last."""
        rows = [('weights', 'horizon', 'updates', 'score', 'at', '')]
        for name in self.climb.names:
            at, score = (self.scores.get(name) or [('-', math.nan)])[-1]
            rows.append(
                (
                    name,
                    str(self.rungs.get(name, '-')),
                    self._updates(name),
                    f'{score:.4f}',
                    str(at),
                    '<- chosen' if name == self.chosen else '',
                )
            )
        head = 'the last score of each of the weights, and when it was measured'
        return f'{head}\n{aligned(rows)}'

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        return {
            'horizons': {name: rung.horizon for name, rung in self.rungs.items()},
            'updates': dict(self.updates),
            'chosen': self.chosen,
            'scores': {name: list(points) for name, points in self.scores.items()},
            'measured': list(self.measured),
            'validated': self.validated,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over the state of a run that is resumed; its choice by the name of the rung."""
        if state['chosen'] in self.climb.names:
            self.climb.chosen = state['chosen']
        else:
            warn(
                f'EMAHook: the chosen average {state["chosen"]!r} of the checkpoint is not in this '
                f'ladder of {", ".join(self.rungs)}: {self.chosen!r} is chosen until the next '
                'validation'
            )
        self.scores = {name: [*map(tuple, points)] for name, points in state['scores'].items()}
        self.measured = dict.fromkeys(state['measured'])
        self.validated = state['validated']
        self.just_resumed = True
