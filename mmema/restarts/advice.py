"""Advice before a run: does the schedule fit the time that is left for it?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mmengine.runner import IterBasedTrainLoop

from ..averaged import ExpMomentumEMA, Restartable
from ..restartable import RestartableConstantEMA
from .moments import FOLLOWED, at_of, first_validation, switch_epochs
from .rewind import saves_best


@dataclass
class Plan:
    """What is known of a run before it starts; times in iterations, one update each.

    ``moments`` and ``switches`` map a name to its iteration, ``epoch`` is the length of an epoch,
    ``steps`` the counter after a restart (None: it goes on), ``momentum`` and ``gamma`` what holds
    after the last one (None: it fits any length), ``own_momentum`` what the hooks themselves set,
    ``best_from`` when there is a best checkpoint first, if a restart goes back to one.
    """

    iterations: int
    moments: dict = field(default_factory=dict)
    switches: dict = field(default_factory=dict)
    epoch: int = 1
    steps: int | None = 0
    momentum: float | None = 0.0002
    gamma: float | None = 2000
    own_momentum: list = field(default_factory=list)
    best_from: int | None = None


def plan_of(runner, ema: Restartable, hooks: list) -> Plan:
    """Return what all restart hooks of a run will do, in iterations."""
    by_iter = isinstance(runner.train_loop, IterBasedTrainLoop)
    epoch = 1 if by_iter else len(runner.train_dataloader)
    plan = Plan(iterations=runner.max_iters, epoch=epoch)
    restarts = []
    for hook in hooks:
        for moment, momentum in hook.moments.items():
            at = at_of(moment) * (epoch if moment.startswith('epoch') else 1)
            plan.moments[moment] = at
            restarts.append((at, hook, momentum))
        values = hook.momentum if isinstance(hook.momentum, (list, tuple)) else [hook.momentum]
        plan.own_momentum += [value for value in values if value]
    followed = {hook.follow for hook in hooks}
    if not by_iter:
        plan.switches = {
            f'{name} switches at epoch {at}': at * epoch
            for name in FOLLOWED
            if name not in followed
            for at in switch_epochs(runner, name, must=False)
        }
    if saves_best(runner) and any(hook.uses_best() for hook in hooks):
        plan.best_from = first_validation(runner) * epoch
    restarts = sorted((r for r in restarts if r[0] < plan.iterations), key=lambda r: r[0])
    last = restarts[-1][1] if restarts else hooks[0]
    plan.steps = last.steps
    # The other schedules fit a stage of any length.
    fixed = isinstance(ema, (ExpMomentumEMA, RestartableConstantEMA))
    set_last = next((momentum for _, _, momentum in reversed(restarts) if momentum), None)
    plan.momentum = (set_last or ema.momentum) if fixed else None
    plan.gamma = (last.gamma or ema.gamma) if isinstance(ema, ExpMomentumEMA) else None
    return plan


def advice(plan: Plan) -> list[str]:
    """Return one line for each thing that does not fit, with numbers and a value that would."""
    lines = [
        f'momentum {m:g} is the weight of the new value; did you mean 1 - {m:g} = {1 - m:.6g}?'
        for m in plan.own_momentum
        if m > 0.5
    ]
    inside = {name: at for name, at in plan.moments.items() if at < plan.iterations}
    lines += [
        f'the milestone {name!r} is beyond the end of the run ({plan.iterations} iterations); the '
        f'last that would fit is {_last_fitting(name, plan)}'
        for name in plan.moments
        if name not in inside
    ]
    lines += [
        f'{name}, and no restart follows it; follow={name.split()[0]!r} would'
        for name, at in plan.switches.items()
        if at < plan.iterations and at not in inside.values()
    ]
    lines += [
        f'the restart {name!r} comes before the first validation, after {plan.best_from} '
        'iterations, so there is no best checkpoint yet and it goes on from the current weights'
        for name, at in inside.items()
        if plan.best_from is not None and at < plan.best_from
    ]
    last = max(inside.values(), default=0)
    return lines + _time_left(plan, last, plan.iterations - last)


def _last_fitting(name: str, plan: Plan) -> int:
    last = plan.iterations - 1
    return last // plan.epoch if name.startswith('epoch') else last


def _time_left(plan: Plan, last: int, left: int) -> list[str]:
    if plan.momentum is None:
        return []
    lines = []
    since = f'{left} updates are left after the last restart'
    momentum = plan.momentum
    if 1 / momentum > left:
        momentum = min(2 / left, 0.5)
        lines.append(
            f'the horizon of momentum {plan.momentum:g} is {1 / plan.momentum:.0f} updates, but '
            f'{since}; momentum={momentum:.2g} would fit'
        )
    if plan.gamma is not None:
        begin = last if plan.steps is None else plan.steps
        warm_up = plan.gamma * math.warn(1 / momentum)
        if warm_up - begin > left:
            fits = max(1, int(left / math.warn(1 / momentum)))
            lines.append(
                f'the warm-up of gamma {plan.gamma:g} ends after about {warm_up:.0f} updates, but '
                f'{since}: until then the average forgets fast; gamma={fits} would fit'
            )
    return lines
