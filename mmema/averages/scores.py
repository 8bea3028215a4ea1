"""Scores of all weights of a run at its validations, and what they tell."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Mapping

from ..messages import aligned
from ..run import MAIN
from ..run.metrics import Watched
from ..run.scalars import read_scalars

AHEAD = 3  # validations in a row after which the log says that the raw weights are ahead


class Scores:
    """The scores of all weights of a run, of one metric.

    Args:
        watched: The metric.
        names: The weights in the order of the table, the main average first.
    """

    def __init__(self, watched: Watched, names: Iterable[str]):
        self.watched = watched
        self.points: dict = {name: [] for name in names}  # (time, score) pairs

    def add(self, points: Mapping[str, Iterable[tuple]]) -> None:
        """Take in (time, score) pairs by the name of the weights; later calls replace earlier."""
        for name, pairs in points.items():
            known = {**dict(self.points.get(name, [])), **dict(pairs)}
            self.points[name] = sorted(known.items())

    def raw_ahead(self) -> str:
        """Return a line if the raw weights have been better for three validations now, else ''."""
        metric, less = self.watched
        raw_at = dict(self.points.get('raw', []))
        pairs = [(ema, raw_at[at]) for at, ema in self.points[MAIN] if at in raw_at][-AHEAD - 1 :]
        ahead = [raw < ema if less else raw > ema for ema, raw in pairs]
        said_before = len(ahead) > AHEAD and ahead[0]
        if less is None or len(ahead) < AHEAD or not all(ahead[-AHEAD:]) or said_before:
            return ''
        numbers = ', '.join(f'{ema:.4g} against {raw:.4g}' for ema, raw in pairs[-AHEAD:])
        return (
            f'the average has been worse than the raw weights for {AHEAD} validations in a row, '
            f'{metric}: {numbers}. Its horizon may be too long for this stage: try a larger '
            'momentum or smaller gamma, a restart where the data changes (mmema.EMARestartHook), '
            'or several averages at once (also= of mmema.EMAHook).'
        )

    def table(self, unit: str) -> str:
        """Return the best and the last score of all weights as lines of text."""
        rows = [('weights', 'best', unit, 'last')]
        for name, points in self.points.items():
            if not points:
                continue
            at, best = self.watched.best(points, key=lambda point: point[1])
            rows.append((name, f'{best:.4f}', str(at), f'{points[-1][1]:.4f}'))
        if self.watched.less is None:  # what would be the best is not known
            rows = [(row[0], row[-1]) for row in rows]
        return f'{self.watched.metric} of all weights\n{aligned(rows)}'


def logged_scores(folder: Path, names: Mapping[str, str], saved: Iterable[int]) -> dict[str, list]:
    """Return the (time, score) pairs that a run has logged before its checkpoint or right after.

    A checkpoint is saved before the validation of its epoch, so the scores in it lack that one.
    Later ones are of a training that the resumed run does not go on from.

    Args:
        folder: The folder of the run; another one has no pairs.
        names: The names of the metric by those of the weights, the main average first.
        saved: The times of the validations whose scores the checkpoint has.
    """
    scalars = read_scalars(folder)
    curves = {weights: scalars.curve(name) for weights, name in names.items()}
    last = max(saved, default=0)
    end = next((at for at, _ in curves[MAIN] if at > last), last)
    return {weights: [p for p in curve if p[0] <= end] for weights, curve in curves.items()}
