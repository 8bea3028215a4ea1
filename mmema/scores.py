"""Scores of several weights over the validations of a run: the table, and the raw ones ahead."""

from __future__ import annotations

from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

AHEAD = 3  # validations in a row after which the log says that the raw weights are ahead


def chosen_metric(runner: Runner, metrics: dict) -> tuple[str, bool]:
    """Return the metric that is compared, and whether less is better.

    It is the first of ``save_best`` that the main weights have, else their first one.
    """
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.save_best is not None:
            for name, rule in zip(hook.key_indicators, hook.rules):
                if name in metrics:
                    return name, rule == 'less'
    return next(iter(metrics)), False


def raw_ahead(scores: dict, metric: str, less: bool) -> str:
    """Return a line if the raw weights have been better for three validations by now, else ''."""
    raw_at = dict(scores.get('raw', []))
    pairs = [(ema, raw_at[at]) for at, ema in scores['ema'] if at in raw_at][-AHEAD - 1 :]
    ahead = [raw < ema if less else raw > ema for ema, raw in pairs]
    said_before = len(ahead) > AHEAD and ahead[0]
    if len(ahead) < AHEAD or not all(ahead[-AHEAD:]) or said_before:
        return ''
    numbers = ', '.join(f'{ema:.4g} against {raw:.4g}' for ema, raw in pairs[-AHEAD:])
    return (
        f'the average has been worse than the raw weights for {AHEAD} validations in a row, '
        f'{metric}: {numbers}. Its horizon may be too long for this stage: try a larger momentum '
        'or smaller gamma, a restart where the data changes (mmema.EMARestartHook), or several '
        'averages at once (also= of mmema.EMAHook).'
    )


def table(scores: dict, metric: str, less: bool, unit: str) -> str:
    """Return the best and the last score of all weights as lines of text.

    Args:
        scores: Lists of (time, score) by the name of the weights.
        metric: The metric's name.
        less: Whether less is better.
        unit: The unit of time, 'epoch' or 'iter'.
    """
    rows = [('weights', 'best', unit, 'last')]
    for name, points in scores.items():
        at, best = (min if less else max)(points, key=lambda point: point[1])
        rows.append((name, f'{best:.4f}', str(at), f'{points[-1][1]:.4f}'))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    return '\n'.join([f'{metric} of all weights', *(line.rstrip() for line in lines)])
