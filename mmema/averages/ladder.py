"""Choice among the rungs of a ladder of averages and the raw weights, validation by validation."""

from __future__ import annotations

import math
from typing import Callable, Sequence

from ..run.horizons import RAW


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
        last: bool = False,
        all_of_them: bool = False,
    ) -> dict[str, float | None]:
        """Choose among the chosen weights and their neighbours; return the scores that were asked.

        The best of the three is chosen from then on; on a tie the choice stays. The last validation
        goes on until both neighbours are worse, and looks at the raw weights in any case.

        Args:
            score_of: Gives the score of weights by name, None where there is none; the greater is
                the better one. Called once for each that is looked at, for the chosen ones first.
            last: Whether this is the last validation of the run. Defaults to False.
            all_of_them: Whether to look at all weights. Defaults to False.
        """
        seen: dict[str, float | None] = {}

        def rank(name: str) -> float:
            if name not in seen:
                seen[name] = score_of(name)
            score = seen[name]
            return -math.inf if score is None or math.isnan(score) else score

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

    def candidates(self, last: bool = False) -> list[str]:
        """Return the weights that a validation may look at."""
        return self.names if last else [self.chosen, *self._neighbours()]
