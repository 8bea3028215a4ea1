"""Advice before a run: does the schedule fit the updates that are left for it?"""

from __future__ import annotations

import math
from typing import Sequence

from ..averaged import MomentumAveragedModel
from ..messages import listed
from ..schedules import ConstantSchedule, ExpSchedule
from .facts import RunFacts
from .planner import Restart, explicit_moments
from .rule import RestartRule


def advice(
    rules: Sequence[RestartRule],
    planned: Sequence[Restart],
    facts: RunFacts,
    ema: MomentumAveragedModel,
) -> list:
    """Return one line for each setting that does not fit, with numbers and a value that would."""
    return [
        *_decays_as_momentum(rules),
        *beyond_the_end(rules, facts),
        *_switches_without_restart(rules, planned, facts, ema),
        *_without_a_best(rules, planned, facts),
        *_updates_left(planned, facts, ema),
    ]


def _decays_as_momentum(rules) -> list:
    return [
        f'momentum {m:g} is the weight of the new value; did you mean 1 - {m:g} = {1 - m:.6g}?'
        for rule in rules
        for m in rule.momenta
        if m is not None and m > 0.5
    ]


def beyond_the_end(rules: Sequence[RestartRule], facts: RunFacts) -> list:
    """Return a line for each milestone after the last iteration."""
    return [
        f'the milestone {str(moment)!r} is beyond the end of the run ({facts.iterations} '
        f'iterations); the last that would fit is {facts.end(moment.unit) - 1}'
        for rule in rules
        for moment in explicit_moments(rule, facts)
        if facts.iteration_at(moment) >= facts.iterations
    ]


def _switches_without_restart(rules, planned, facts, ema) -> list:
    followed = {rule.follow for rule in rules}
    times = {restart.iteration for restart in planned}
    return [
        f'{name} switches at epoch {epoch}, and no restart follows it; follow={name!r} would'
        + _share_from_before(facts, ema, epoch)
        for name, epochs in facts.switches.items()
        for epoch in epochs
        if name not in followed
        and epoch < facts.end('epoch')
        and epoch * facts.epoch_length not in times
    ]


def _share_from_before(facts, ema, epoch) -> str:
    if not isinstance(ema.schedule, (ExpSchedule, ConstantSchedule)):
        return ''
    blends = (facts.updates - facts.update_of(epoch * facts.epoch_length)) // ema.interval
    share = (1 - ema.schedule.momentum) ** blends
    return f'. Without one, {share:.2f} of the average at the end are weights from before it'


def _without_a_best(rules, planned, facts) -> list:
    if facts.first_best is None:
        if not any(rule.uses_best for rule in rules):
            return []
        return [
            "source='best' finds no best checkpoint in this run, so restarts go on from the "
            'current weights. Set default_hooks.checkpoint.save_best.'
        ]
    best = [restart for restart in planned if restart.source == 'best']
    early = [restart.causes[0] for restart in best if restart.iteration < facts.first_best]
    if not early:
        return []
    subject = f'restarts {listed(early)} come' if early[1:] else f'restart {early[0]!r} comes'
    return [
        f'the {subject} before the first validation, after {facts.first_best} iterations, so there '
        'is no best checkpoint yet: training goes on from the current weights'
    ]


def _updates_left(planned, facts, ema) -> list:
    schedule = ema.schedule
    if not isinstance(schedule, (ExpSchedule, ConstantSchedule)):
        return []  # the other schedules fit a stage of any length
    values, counter, last = dict(ema.hyperparameters), 0, facts.update_of(facts.begin)
    for restart in planned:
        values.update(restart.changes)
        counter += restart.update - last
        last = restart.update
        if restart.steps is not None:
            counter = restart.steps
    left = facts.updates - last
    since = f'{left} updates are left' + (' after the last restart' if planned else '')
    momentum, lines = values['momentum'], []
    if ema.interval / momentum > left:
        momentum = min(2 * ema.interval / left, 0.5)
        lines.append(
            f'the horizon of momentum {values["momentum"]:g} is '
            f'{ema.interval / values["momentum"]:.0f} updates, but {since}; '
            f'momentum={momentum:.2g} would fit'
        )
    if isinstance(schedule, ExpSchedule):  # counts updates, blended or not
        warm_up = values['gamma'] * -math.log(momentum)
        if warm_up - counter > left:
            fits = max(1, int(left / -math.log(momentum)))
            lines.append(
                f'the warm-up of gamma {values["gamma"]:g} ends after about {warm_up:.0f} updates, '
                f'but {since}: until then the average forgets fast; gamma={fits} would fit'
            )
    return lines
