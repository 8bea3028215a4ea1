"""Horizons: how much of a run an average remembers, alone or as the rungs of a ladder."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..messages import RunError
from .config import ema_hook_in
from .facts import RunFacts

RAW = 'raw'  # the trained weights themselves, the lowest rung of any ladder
AUTO = (0.003, 0.01, 0.03, 0.1, 0.3)  # of the updates of a run


def parsed_horizon(horizon: str | float) -> tuple[float, str]:
    """Return number and unit ('epoch', 'update' or 'run') of a horizon; raise ValueError.

    The space may be missing: ``--cfg-options`` drops it.
    """
    if isinstance(horizon, float) and 0 < horizon < 1:
        return horizon, 'run'
    match = re.fullmatch(r'(\d+(?:\.\d+)?) ?(epoch|update)s?', str(horizon))
    if match is None or not float(match[1]):
        raise ValueError(
            "horizon must be such as '2 epochs', '500 updates' or 0.01, a share of the run in "
            f'(0, 1), got {horizon!r}'
        )
    return float(match[1]), match[2]


def updates_of_horizon(horizon: str | float, facts: RunFacts) -> float:
    """Return the updates of a run that a horizon is; RunError if the run has no such unit."""
    updates, unit = parsed_horizon(horizon)
    if unit == 'epoch' and not facts.by_epoch:
        raise RunError(
            f'horizon={horizon!r} must be in a run by epochs, got one by iterations. Give it in '
            "updates ('500 updates'), or as a share of the run (0.01)."
        )
    if unit != 'update':
        updates *= facts.updates if unit == 'run' else facts.epoch_length / facts.accumulation
    return updates


def is_ladder(horizon) -> bool:
    """Return whether the ``horizon`` of an EMAHook is several: ``'auto'``, or a list."""
    return horizon == 'auto' or isinstance(horizon, (list, tuple))


@dataclass(frozen=True)
class Rung:
    """One average of a ladder: its name in metrics, files and commands, and its horizon."""

    name: str
    horizon: str | float

    def __str__(self) -> str:
        number, unit = parsed_horizon(self.horizon)
        return f'{100 * number:g} % of the run' if unit == 'run' else str(self.horizon)


def rungs_of(horizon) -> list[Rung]:
    """Return the rungs of a ladder, in the order in which they are given.

    Args:
        horizon: ``'auto'``, or horizons such as ``['50 updates', '1 epoch', 0.1]``.

    Raises:
        ValueError: If the list has fewer than two horizons, one twice, or one that is none.

    Example:
        >>> [rung.name for rung in rungs_of('auto')]
        ['h0_3', 'h1', 'h3', 'h10', 'h30']
        >>> [rung.name for rung in rungs_of(['50 updates', '1 epoch'])]
        ['h50_updates', 'h1_epoch']
    """
    horizons = AUTO if horizon == 'auto' else horizon
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


def ladder_in(config: dict) -> list[str]:
    """Return the names of all weights of a config's ladder, the raw ones first; else none."""
    horizon = ema_hook_in(config).get('horizon')
    try:
        return [RAW, *(rung.name for rung in rungs_of(horizon))] if is_ladder(horizon) else []
    except ValueError:  # of a text that is cut short
        return []


def _name_of(horizon: str | float) -> str:
    number, unit = parsed_horizon(horizon)
    text = f'{100 * number if unit == "run" else number:.6g}'
    text = re.sub(r'\W', '_', text)
    return f'h{text}' if unit == 'run' else f'h{text}_{unit}' + ('' if number == 1 else 's')
