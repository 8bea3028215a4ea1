"""Advice before a run: does the schedule fit the updates that are left for it?"""

from __future__ import annotations

import math
from typing import Sequence

from ..averaged import MomentumAveragedModel
from ..messages import listed
from ..run.facts import RunFacts
from ..schedules import ConstantSchedule, ExpSchedule
from .planner import Restart, explicit_moments
from .rule import RestartRule

FIXED = (ExpSchedule, ConstantSchedule)  # other schedules fit a stage of any length


def advice(
    rules: Sequence[RestartRule],
    planned: Sequence[Restart],
    facts: RunFacts,
    ema: MomentumAveragedModel,
) -> list:
    """Return one line for each setting that does not fit, with numbers and a value that would."""
    decays = [m for rule in rules for m in rule.momenta if m is not None and m > 0.5]
    return [
        *(
            f'momentum {m:g} is the weight of the new value; did you mean 1 - {m:g} = {1 - m:.6g}?'
            for m in decays
        ),
        *beyond_the_end(rules, facts),
        *_switches_without_restart(rules, planned, facts, ema),
        *_without_a_best(rules, planned, facts),
        *_updates_left(planned, facts, ema),
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


def _switches_without_restart(rules, planned, facts, ema):
    followed = {rule.follow for rule in rules}
    times = {restart.iteration for restart in planned}
    for name, epochs in facts.switches.items():
        for epoch in epochs:
            at = epoch * facts.epoch_length
            if name in followed or at in times or at >= facts.iterations:
                continue
            share = ''
            if isinstance(ema.schedule, FIXED):
                blends = (facts.updates - facts.update_of(at)) // ema.interval
                share = (
                    f'. Without one, {(1 - ema.schedule.momentum) ** blends:.2f} of the average at '
                    'the end are weights from before it'
                )
            yield (
                f'{name} switches at epoch {epoch}, and no restart follows it; '
                f'follow={name!r} would{share}'
            )


def _without_a_best(rules, planned, facts):
    if facts.first_best is None:
        if any(rule.uses_best for rule in rules):
            yield (
                "source='best' finds no best checkpoint in this run, so restarts go on from the "
                'current weights. Set default_hooks.checkpoint.save_best.'
            )
        return
    best = [restart for restart in planned if restart.values.get('source') == 'best']
    early = [restart.causes[0] for restart in best if restart.iteration < facts.first_best]
    if early:
        subject = f'restarts {listed(early)} come' if early[1:] else f'restart {early[0]!r} comes'
        yield (
            f'the {subject} before the first validation, after {facts.first_best} iterations, so '
            'there is no best checkpoint yet: training goes on from the current weights'
        )


def _updates_left(planned, facts, ema):
    if not isinstance(ema.schedule, FIXED):
        return
    values, counter, last = dict(ema.hyperparameters), 0, facts.update_of(facts.begin)
    for restart in planned:
        counter = restart.values.get('steps', counter + restart.update - last)
        values.update(restart.changes)
        last = restart.update
    left = facts.updates - last
    since = f'{left} updates are left' + (' after the last restart' if planned else '')
    momentum = values['momentum']
    if left < 1:
        yield f'the average is never updated: {since}'
        return
    if ema.interval / momentum > left:
        fits = min(2 * ema.interval / left, 0.5)
        yield (
            f'the horizon of momentum {momentum:g} is {ema.interval / momentum:.0f} updates, but '
            f'{since}; momentum={fits:.2g} would fit'
        )
        momentum = fits
    if isinstance(ema.schedule, ExpSchedule):  # counts updates, blended or not
        warm_up = values['gamma'] * -math.log(momentum)
        if warm_up - counter > left:
            yield (
                f'the warm-up of gamma {values["gamma"]:g} ends after about {warm_up:.0f} updates, '
                f'but {since}: until then the average forgets fast; '
                f'gamma={max(1, int(left / -math.log(momentum)))} would fit'
            )
