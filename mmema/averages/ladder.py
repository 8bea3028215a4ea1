"""Ladder of averages with rising horizons, and the choice among them at each validation."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Callable, Sequence

from .units import parsed_horizon

RAW = 'raw'  # the lowest rung: the trained weights themselves
AUTO = (0.003, 0.01, 0.03, 0.1, 0.3)  # of the updates of a run; the middle one is chosen first
SHARE_OF_BLEND = 100  # a rung is blended at every 1/100 of its horizon


@dataclass(frozen=True)
class Rung:
    """One average of a ladder: its name in metrics, files and commands, and its horizon."""

    name: str
    horizon: str | float


def rungs_of(horizon: str | Sequence) -> list[Rung]:
    """Return the rungs of a ladder, the shortest first as far as that is known without the run.

    Args:
        horizon: ``'auto'``, or a list of horizons such as ``['50 updates', '1 epoch', 0.1]``.

    Raises:
        TypeError: If it is neither.
        ValueError: If the list has fewer than two horizons, one twice, or one that is none.

    Example:
        >>> [rung.name for rung in rungs_of('auto')]
        ['h0_3', 'h1', 'h3', 'h10', 'h30']
        >>> [rung.name for rung in rungs_of(['50 updates', '1 epoch'])]
        ['h50_updates', 'h1_epoch']
    """
    horizons = AUTO if horizon == 'auto' else horizon
    if not isinstance(horizons, (list, tuple)):
        raise TypeError(f"horizon must be 'auto', one horizon, or a list of them, got {horizon!r}")
    if len(horizons) < 2:
        raise ValueError(
            f'a ladder must have at least two horizons, got {list(horizons)!r}. For one average '
            f'give the horizon itself'
        )
    rungs = [Rung(_name_of(one), one) for one in horizons]
    names = [rung.name for rung in rungs]
    twice = [rung.horizon for rung in rungs if names.count(rung.name) > 1]
    if twice:
        raise ValueError(f'the horizons of a ladder must differ, got {twice[0]!r} twice')
    return rungs


def _name_of(horizon: str | float) -> str:
    number, unit = parsed_horizon(horizon)
    text = f'{100 * number if unit == "run" else number:.6g}'
    text = re.sub(r'\W', '_', text)
    return f'h{text}' if unit == 'run' else f'h{text}_{unit}' + ('' if number == 1 else 's')


def blend_interval(updates: float) -> int:
    """Return the interval at which an average with a horizon of so many updates is blended.

    The share of the weights older than any age then differs by at most 1 % from that of an average
    that is blended at every update.
    """
    return max(1, int(updates) // SHARE_OF_BLEND)


class Climb:
    """The choice among weights that are ordered by their horizon, validation by validation.

    Args:
        names: The weights in the order of their horizons; the first one is :data:`RAW`.
        chosen: The one to begin with.
    """

    def __init__(self, names: Sequence[str], chosen: str):
        self.names = list(names)
        self.chosen = chosen

    def see(
        self,
        score_of: Callable[[str], float | None],
        less: bool = False,
        last: bool = False,
        all_of_them: bool = False,
    ) -> dict[str, float | None]:
        """Choose among the chosen weights and their neighbours; return the scores that were asked.

        The best of the three is chosen from then on; on a tie the choice stays. The last validation
        goes on until both neighbours are worse, and looks at the raw weights in any case.

        Args:
            score_of: Gives the score of weights by name, None where there is none; called once for
                each that is looked at, for the chosen ones first.
            less: Whether less of the score is better. Defaults to False.
            last: Whether this is the last validation of the run. Defaults to False.
            all_of_them: Whether to look at all weights. Defaults to False.
        """
        seen: dict[str, float | None] = {}

        def rank(name: str) -> float:
            if name not in seen:
                seen[name] = score_of(name)
            score = seen[name]
            if score is None or math.isnan(score):
                return -math.inf
            return -score if less else score

        def move_to_best(names: Sequence[str]) -> bool:
            best = self.chosen
            for name in names:
                if rank(name) > rank(best):
                    best = name
            moved, self.chosen = best != self.chosen, best
            return moved

        rank(self.chosen)
        if all_of_them:
            move_to_best(self.names)
            return seen
        moved = move_to_best(self._neighbours())
        while last and (moved or move_to_best([RAW])):
            moved = move_to_best(self._neighbours())
        return seen

    def _neighbours(self) -> list[str]:
        place = self.names.index(self.chosen)
        return self.names[max(place - 1, 0) : place] + self.names[place + 1 : place + 2]
