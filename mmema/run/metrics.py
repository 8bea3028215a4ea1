"""The metric that a run watches: its name, its direction, and its names for all weights of a run.

:class:`mmema.EMAValLoop` logs the metrics of the main average under their own names, and those of
other weights with a prefix: ``coco/bbox_mAP`` and ``raw/coco/bbox_mAP``.
"""

from __future__ import annotations

import math
from typing import Callable, Iterable, NamedTuple, Sequence

from mmengine.hooks import CheckpointHook
from mmengine.runner.base_loop import BaseLoop

from .config import averages_in, kind_of
from .horizons import ladder_in

NO_METRICS = ('step', 'time', 'data_time', 'ema_chosen')  # in a logged validation


class Watched(NamedTuple):
    """A metric under its name for the main average, and which values of it are better."""

    metric: str | None  # None where nothing was measured
    less: bool | None = None  # whether less is better; None where nobody knows

    def best(self, items: Iterable, key: Callable):
        """Return the item with the best value; one that is not finite only where none is."""
        items = list(items)
        finite = [item for item in items if math.isfinite(key(item))]
        return (min if self.less else max)(finite or items[-1:], key=key)


def watched_metric(
    hooks: Iterable,
    names: Sequence[str],
    prefixes: Iterable[str] = (),
    metric: str | None = None,
    rule: str | None = None,
) -> Watched:
    """Return the first metric of ``save_best`` that was measured, else the first that was.

    Args:
        hooks: The hooks of a Runner, or their settings in a config.
        names: The metrics of the main average that were measured; see :func:`main_names`.
        prefixes: Of the metrics of other weights, which ``save_best`` may name.
        metric: One that a person asks for instead. Defaults to None.
        rule: 'greater' or 'less', where a person gives it. Defaults to None: that of ``save_best``,
            else what MMEngine knows of the name.
    """
    rules: dict = {}
    for name, own in _save_best(hooks):
        if name == 'auto':
            name = next(iter(names), '')
        known = next((n for n in (name, without_prefix(name, prefixes)) if n in names), None)
        if known is not None:
            rules.setdefault(known, own)
    metric = metric or next(iter([*rules, *names]), None)
    return Watched(metric, less_is_better(metric, rule or rules.get(metric)) if metric else None)


def saved_metrics(hooks: Iterable, prefixes: Iterable[str] = ()) -> list[str]:
    """Return the metrics that ``save_best`` names, as those of the main average."""
    names = [without_prefix(name, prefixes) for name, _ in _save_best(hooks) if name != 'auto']
    return list(dict.fromkeys(names))


def less_is_better(metric: str, rule: str | None = None) -> bool | None:
    """Tell whether less of a metric is better; None where neither the rule nor MMEngine knows."""
    try:
        return CheckpointHook(save_best=metric, rule=rule).rules == ['less']
    except ValueError:  # MMEngine knows a few names
        return None


def _save_best(hooks: Iterable) -> list[tuple[str, str | None]]:
    """Return the metrics by which best checkpoints are chosen, with their rules where they have."""
    pairs: list = []
    for hook in hooks:
        if isinstance(hook, CheckpointHook) and hook.save_best is not None:
            pairs += zip(hook.key_indicators, hook.rules)
        elif isinstance(hook, dict) and kind_of(hook) == 'CheckpointHook':
            names, rules = hook.get('save_best') or [], hook.get('rule')
            names = [names] if isinstance(names, str) else names
            rules = rules if isinstance(rules, list) else [rules]
            pairs += zip(names, rules * len(names) if len(rules) == 1 else rules)
    return pairs


# --- names for all weights ----------------------------------------------------------------------


def prefixes_of(loop: BaseLoop | None) -> dict[str, str]:
    """Return the prefixes that a validation loop gives metrics, by the names of the weights."""
    return _prefixes(getattr(loop, 'weights', ()), getattr(loop, 'prefix', 'raw'))


def prefixes_in(config: dict, averages: Iterable[str] | None = None) -> dict[str, str]:
    """Return the same from a config; ``averages`` are those beside the main one, if not its own.

    Without a ``val_cfg``, as in a text that is cut short, the loop is taken for an EMAValLoop.
    """
    loop, ladder = config.get('val_cfg'), ladder_in(config)
    if loop is not None and kind_of(loop) in ('', 'ValLoop'):
        return _prefixes(ladder, 'raw')  # it evaluates the main average alone, or a ladder
    loop = loop or {}
    weights = loop.get('weights')
    if weights is None:
        weights = ['raw', *(averages_in(config) if averages is None else averages)]
    return _prefixes([*weights, *ladder], loop.get('prefix', 'raw').strip('/'))


def _prefixes(weights: Iterable[str], prefix: str) -> dict[str, str]:
    return {name: f'{prefix if name == "raw" else name}/' for name in weights}


def without_prefix(name: str, prefixes: Iterable[str]) -> str:
    """Return the name that a metric has for the main average."""
    return next((name[len(p) :] for p in prefixes if name.startswith(p)), name)


def main_names(measured: Iterable[str], prefixes: Iterable[str]) -> list[str]:
    """Return the names that the metrics of a run's validations have for the main average.

    An average may be called 'coco': ``coco/bbox_mAP`` is its metric only where the main one, or
    other weights, have ``bbox_mAP``. The raw weights' own prefix says enough: the main average may
    have found nothing yet.
    """
    names, prefixes = list(measured), list(prefixes)
    known, own = set(names), {}
    for name in names:
        rests = {prefix: name[len(prefix) :] for prefix in prefixes if name.startswith(prefix)}
        others = [
            rest
            for prefix, rest in rests.items()
            if prefix == 'raw/'
            or rest in known
            or any(other != prefix and other + rest in known for other in prefixes)
        ]
        own[others[0] if others else name] = None
    return [name for name in own if name not in NO_METRICS]


def is_score(point: dict, name: str | None) -> bool:
    """Tell whether a validation has a finite value of a metric."""
    value = point.get(name)
    return value is not None and math.isfinite(value)
