"""Momentum in other units: a horizon in epochs or updates, and the batch size it was tuned at."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from mmengine.dist import get_world_size
from mmengine.model import BaseAveragedModel
from mmengine.runner import Runner

from ..messages import RunError
from ..restarts.facts import RunFacts


@dataclass(frozen=True)
class Horizon:
    """How many recent updates an average remembers: ``interval / momentum``.

    Args:
        value: ``'2 epochs'``, ``'500 updates'``, or a share of the run in (0, 1), such as 0.01.
    """

    value: str | float

    def __post_init__(self) -> None:
        is_share = isinstance(self.value, float) and 0 < self.value < 1
        if not is_share and not (isinstance(self.value, str) and all(self._parsed())):
            raise ValueError(
                "horizon must be such as '2 epochs', '500 updates' or 0.01, a share of the run in "
                f'(0, 1), got {self.value!r}'
            )

    def _parsed(self) -> tuple:
        match = re.fullmatch(r'(\d+(?:\.\d+)?) (epoch|update)s?', self.value)
        return (float(match[1]), match[2]) if match else (0.0, '')

    def momentum(self, facts: RunFacts, interval: int) -> float:
        """Return the momentum of an average that is blended at every ``interval``-th update.

        Raises:
            RunError: If the run has no epochs, or too few updates for this horizon.
        """
        number, unit = (self.value, 'run') if isinstance(self.value, float) else self._parsed()
        if unit == 'epoch' and not facts.by_epoch:
            raise RunError(
                f'horizon={self.value!r} must be in a run by epochs, got one by iterations. Give '
                "it in updates ('500 updates'), or as a share of the run (0.01)."
            )
        updates = number
        if unit != 'update':
            updates *= facts.updates if unit == 'run' else facts.epoch_length / facts.accumulation
        if updates <= interval:
            raise RunError(
                f'a horizon must be longer than interval={interval}, but horizon={self.value!r} is '
                f'{updates:g} updates of this run'
            )
        return interval / updates


@dataclass(frozen=True)
class BatchScale:
    """Ratio of a run's batch to the one that momentum and gamma were chosen for.

    With ``k`` times the batch, one update does the work of ``k``: ``m' = 1 - (1 - m) ** k`` and
    ``gamma' = gamma / k``. Source: Busbridge et al., How to Scale Your EMA, 2023.
    """

    batch: int
    base: int

    def scaled(self, values: dict) -> dict:
        """Return ``momentum`` and ``gamma``, as far as they are among the values, scaled."""
        k, new = self.batch / self.base, {}
        if 'momentum' in values:
            new['momentum'] = -math.expm1(k * math.log1p(-values['momentum']))
        if 'gamma' in values:
            new['gamma'] = values['gamma'] / k
        return new


def auto_scale_base(runner: Runner) -> int | None:
    """Return the batch size of ``auto_scale_lr``, if that is enabled."""
    strategy = getattr(runner, 'strategy', None)  # of FlexibleRunner
    scale_lr = getattr(runner, 'auto_scale_lr', None) or getattr(strategy, '_auto_scale_lr', None)
    return scale_lr['base_batch_size'] if scale_lr and scale_lr.get('enable') else None


def batch_scale(runner: Runner, base: int, facts: RunFacts) -> BatchScale:
    """Return the scale of a run; its batch counts all ranks and the accumulated iterations."""
    loader = runner.train_dataloader
    batch = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None)
    if batch is None:
        raise RunError(
            'base_batch_size needs the batch size of the run, but its batch_sampler, a '
            f'{type(loader.batch_sampler).__name__}, does not tell it. Leave base_batch_size out, '
            'and give momentum and gamma for the batch size that you use.'
        )
    return BatchScale(batch * get_world_size() * facts.accumulation, base)


def settle(
    ema: BaseAveragedModel, horizon: Horizon | None, scale: BatchScale | None, facts: RunFacts
) -> str:
    """Give an average the momentum and gamma of its run; return what changed, for the log.

    They count as the constructor's; values that a restart has set stay. A horizon is one of this
    run: it is not scaled.
    """
    changed = getattr(ema, '_changed', ())
    own = {name: getattr(ema, name, None) for name in ('momentum', 'gamma')}
    own = {n: v for n, v in own.items() if isinstance(v, (int, float)) and n not in changed}
    new, why = {}, []
    if scale is not None:
        new = scale.scaled(own)
        why.append(f'a batch of {scale.batch} with base_batch_size={scale.base}')
    if horizon is not None and 'momentum' in own:
        new['momentum'] = horizon.momentum(facts, ema.interval)
        why.append(f'horizon={horizon.value!r}')
    if hasattr(ema, 'schedule'):
        ema.schedule = replace(ema.schedule, **new)  # assigning a live value counts as a change
    else:
        for name, value in new.items():
            setattr(ema, name, value)
    changes = ', '.join(f'{name} {own[name]:g} -> {value:g}' for name, value in new.items())
    return changes and f'{" and ".join(why)}: {changes}'
