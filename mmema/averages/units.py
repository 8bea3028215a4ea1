"""Momentum in other units: a horizon in epochs or updates, and the batch size it was tuned at."""

from __future__ import annotations

import math
from dataclasses import replace

from mmengine.model import BaseAveragedModel

from ..messages import RunError
from ..run import RunFacts
from ..run.horizons import updates_of_horizon
from .config import AverageConfig

LEAST_MOMENTUM = 2**-24  # half a unit in the last place of float32, as a share of the value
MUCH = 0.01  # a change of a weight whose loss deserves a warning


def momentum_of_horizon(horizon: str | float, interval: int, facts: RunFacts) -> float:
    """Return the momentum of an average that remembers so many of the run's recent updates."""
    updates = updates_of_horizon(horizon, facts)
    if updates <= interval:
        raise RunError(
            f'a horizon must be longer than interval={interval}, but horizon={horizon!r} is '
            f'{updates:g} updates of this run'
        )
    if interval / updates <= LEAST_MOMENTUM:
        raise RunError(
            f'a horizon must be shorter than {interval / LEAST_MOMENTUM:,.0f} updates for '
            f'interval={interval}, or float32 rounds every blend away, but horizon={horizon!r} is '
            f'{updates:g} updates of this run'
        )
    return interval / updates


def blend_interval(updates: float) -> int:
    """Return the interval at which an average with a horizon of so many updates is blended.

    The share of the weights older than any age then differs by at most 1 % from that of an average
    that is blended at every update.
    """
    return max(1, int(updates) // 100)


def least_change(ema: BaseAveragedModel, updates: int) -> float | None:
    """Return the least relative change of a weight that an average follows; None if not known.

    A blend adds ``m (src - avg)``, and float32 rounds away what is below half a unit in the last
    place: up to ``2**-24`` of a value. The momentum is that at the end of so many updates.
    """
    if not hasattr(ema, 'momentum_at'):
        return None
    last = max((updates - 1) // ema.interval, 1) * ema.interval
    return LEAST_MOMENTUM / ema.momentum_at(last)


def told_least_change(ema: BaseAveragedModel, updates: int) -> tuple[str, bool]:
    """Return what to tell of the least change, and whether it is a warning.

    Raises:
        RunError: If the average could not even follow a weight that doubles.
    """
    change = least_change(ema, updates)
    if change is None:
        return '', False
    momentum = LEAST_MOMENTUM / change
    if change >= 1:
        raise RunError(
            f'momentum must be above 2**-24 (6e-08), or float32 rounds every blend away, got '
            f'{momentum:g}. Take a larger one, with a larger interval for the same horizon.'
        )
    text = f'at momentum {momentum:g} changes of a weight below {100 * change:.2g} % may be lost'
    if change < MUCH:
        return text, False
    factor = 10 ** math.ceil(math.log10(change / MUCH))
    return f'{text}; {factor} times the interval and the momentum has the same horizon', True


def scaled(values: dict, k: float) -> dict:
    """Return ``momentum`` and ``gamma``, as far as they are there, for ``k`` times the batch.

    One update does the work of ``k``: ``m' = 1 - (1 - m) ** k`` and ``gamma' = gamma / k``.

    Source: Busbridge et al., How to Scale Your EMA, 2023.
    """
    formulas = {
        'momentum': lambda m: -math.expm1(k * math.log1p(-m)),
        'gamma': lambda gamma: gamma / k,
    }
    return {name: formula(values[name]) for name, formula in formulas.items() if name in values}


def settle_average(
    ema: BaseAveragedModel,
    config: AverageConfig,
    base: int | None,
    batch: int | None,
    facts: RunFacts,
) -> str:
    """Give an average the interval, momentum and gamma that its config means in a run; see settle.

    All of a rung of a ladder is in units of the run: no batch size changes it.
    """
    of_gamma = config.blends_of_gamma
    if config.auto_interval:
        ema.interval = blend_interval(updates_of_horizon(config.horizon, facts))
    base = base if of_gamma is None else None
    return settle(ema, config.horizon, base, batch, facts, of_gamma)


def settle(
    ema: BaseAveragedModel,
    horizon: str | float | None,
    base: int | None,
    batch: int | None,
    facts: RunFacts,
    blends_of_gamma: float | None = None,
) -> str:
    """Give an average the momentum and gamma of its run; return what changed, for the log.

    ``batch`` is the size of a batch of one update, where there is a ``base`` to compare it with.
    They count as the constructor's; values that a restart has set stay. A horizon is one of this
    run: it is not scaled. With ``blends_of_gamma`` gamma is so many blends, at the interval that
    the average has.
    """
    if horizon is not None and not hasattr(ema, 'momentum'):
        raise RunError(f'horizon={horizon!r} must be of a momentum; {type(ema).__name__} has none')
    set_later = getattr(ema, '_changed', ())
    names = [n for n in ('momentum', 'gamma') if hasattr(ema, n) and n not in set_later]
    own = {name: getattr(ema, name) for name in names}
    new, why = {}, []
    if base is not None:
        new = scaled(own, batch / base)
        why.append(f'a batch of {batch} with base_batch_size={base}')
    if horizon is not None and 'momentum' in own:
        new['momentum'] = momentum_of_horizon(horizon, ema.interval, facts)
        why.append(f'horizon={horizon!r}')
    if blends_of_gamma is not None and 'gamma' in own:
        new['gamma'] = blends_of_gamma * ema.interval
    if hasattr(ema, 'schedule'):
        ema.schedule = replace(ema.schedule, **new)  # assigning a live value counts as a change
    else:
        for name, value in new.items():
            setattr(ema, name, value)
    changes = ', '.join(f'{name} {own[name]:g} -> {value:g}' for name, value in new.items())
    return changes and f'{" and ".join(why)}: {changes}'
