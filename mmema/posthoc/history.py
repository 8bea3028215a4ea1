"""History of an average without a record, worked out from config, counters and restart rules.

The classes of MMEngine, MMDetection and MMYOLO have no record, nor had those of mmema 0.1.0. What
these files leave open is refused.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields, replace
from itertools import repeat
from typing import Iterable

import numpy as np
from torch import nn

from .. import restartable
from ..checkpoints.formats import CheckpointError
from ..messages import listed
from ..restartable import Restartable
from ..restarts.planner import Restart, merged, restart_at
from ..restarts.profile import momenta
from ..restarts.rule import RestartRule
from ..run import MAIN, Moment
from ..run.config import is_ours
from .facts import AverageFacts, FileFacts

CLASSES = [cls for cls in vars(restartable).values() if isinstance(cls, type)]
CLASSES = [cls for cls in CLASSES if issubclass(cls, Restartable) and cls is not Restartable]
BY_SCHEDULE = {cls.schedule_type.name: cls for cls in CLASSES}
BY_NAME = {**{cls.__name__: cls for cls in CLASSES}, **restartable.STOCK_EQUIVALENTS}


@dataclass(frozen=True)
class Given:
    """What a person says of an average, where its checkpoints do not."""

    ema_type: str | None = None
    momentum: float | None = None
    gamma: float | None = None
    interval: int | None = None


NOTHING = Given()


def momenta_between(
    before: FileFacts | None, after: FileFacts, name: str = MAIN, given: Given = NOTHING
) -> np.ndarray:
    """Return the momentum of every update of an average between two checkpoints of a run.

    Args:
        before: The earlier file; None for the beginning of the run.
        after: The later file.
        name: The average: 'ema', the main one, or its name in ``also``.
        given: What the files do not say.

    Returns:
        The momenta in the order of time: 1 for a copy, 0 for an update that ``interval`` skips.

    Raises:
        CheckpointError: If the files do not say how the average was updated, or if their counters
            and live values contradict it.
    """
    end = average_in(after, name)
    begin = average_in(before, name) if before else AverageFacts(0)
    if before:
        _check_settings(before, after, name)
        _check_run(before, after)
    average = _build_average(after, name, begin, given)
    restarts = _restarts_between(before, after, name)
    first = before.updates if before else 0
    copied = 0  # of the updates, those before the average began
    if before and not restarts and begin.restarts == end.restarts:
        updates = end.steps - begin.steps  # true whatever an update is
    else:
        updates = after.updates - first
        if begin.steps == 0:
            copied = min(max(after.run.update_of(after.run.begin) - first, 0), updates)
    if updates < 0:
        raise CheckpointError(
            f'the counter of {name} must rise from {before} to {after}, but it falls from '
            f'{begin.steps} to {end.steps}, and no restart in the files explains it'
        )
    restarts = [replace(restart, update=restart.update - first) for restart in restarts]
    values = momenta(average, updates, restarts, copied)
    _check_end(average, end, name, after)
    return values


def average_in(file: FileFacts, name: str) -> AverageFacts:
    """Return the facts of an average; raise CheckpointError if the file does not have it."""
    if name not in file.averages:
        has = ', '.join(file.averages) or 'none: the run had no EMAHook, or its state was dropped'
        raise CheckpointError(f'{file} has no average {name!r} with its counter; it has {has}')
    return file.averages[name]


def average_config(file: FileFacts, name: str) -> dict:
    """Return the settings of an average in the EMAHook of the run's config; none if not there."""
    hook = dict(file.hook)
    if not hook:
        return {}
    hook.setdefault(
        'ema_type',
        'RestartableExpMomentumEMA' if is_ours(hook) else 'ExponentialMovingAverage',
    )
    also = hook.pop('also', None) or {}
    own = also.get(name, {}) if name != MAIN else {}
    if 'momentum' in own:
        hook.pop('horizon', None)
    return {**hook, **own}


def repeats_tied(file: FileFacts, name: str, given: Given = NOTHING) -> bool:
    """Return whether an average blends a tied tensor once for each of its names.

    The classes of MMEngine, MMDetection and MMYOLO do, with ``update_buffers=True``: they go
    through a ``state_dict``. Where the config does not tell, it is taken for given.
    """
    settings, average = average_config(file, name), average_in(file, name)
    kind = str(settings.get('ema_type') or given.ema_type)
    ours = average.schedule or kind.startswith('mmema.')
    return not ours and settings.get('update_buffers', not settings)


def _check_settings(before: FileFacts, after: FileFacts, name: str) -> None:
    """Raise CheckpointError if a resumed run had another average than before."""
    one, other = average_config(before, name), average_config(after, name)
    names = ['ema_type', 'interval', 'update_buffers', 'exclude']
    if not average_in(after, name).live:  # else live values are compared
        names += sorted({*one, *other} - {*names, 'type', 'priority', 'begin_iter', 'begin_epoch'})
    for key in names if one and other else ():
        if one.get(key) != other.get(key):
            raise CheckpointError(
                f'{key} of {name} must be the same in the configs of {before} and {after}, got '
                f'{one.get(key)} and {other.get(key)}: when it changed is not known'
            )


def _check_run(before: FileFacts, after: FileFacts) -> None:
    """Raise CheckpointError if a resumed run had other updates in an epoch than before."""
    one, other = before.run, after.run
    for label, key in (('epoch', 'epoch_length'), ('update', 'accumulation')):
        if getattr(one, key) != getattr(other, key):
            raise CheckpointError(
                f'the iterations of an {label} must be the same in {before} and {after}, got '
                f'{getattr(one, key)} and {getattr(other, key)}: when that changed is not known'
            )


def _build_average(file: FileFacts, name: str, begin: AverageFacts, given: Given) -> Restartable:
    """Return an average of one layer with the schedule and the state that the real one had."""
    settings, end = average_config(file, name), average_in(file, name)
    kind = _class_of(file, name, settings, end.schedule, given)
    known = {f.name for f in fields(kind.schedule_type)}
    arguments = {key: value for key, value in settings.items() if key in known}
    # At the beginning as in the later file, but for values that were changed.
    unchanged = {key: value for key, value in end.live.items() if key not in end.changed}
    arguments.update(begin.live or unchanged)
    scaled = is_ours(settings) and (
        settings.get('horizon') is not None
        or settings.get('base_batch_size') is not None
        or (file.config.get('auto_scale_lr') or {}).get('enable')
    )
    if scaled:  # the config does not have the values in use
        in_states = begin.live or unchanged
        for key in {'momentum', 'gamma'}.difference(in_states):
            arguments.pop(key, None)
    interval = settings.get('interval', 1) if settings else None
    found = {'interval': interval, **{key: arguments.get(key) for key in ('momentum', 'gamma')}}
    for key, value in found.items():
        told = getattr(given, key)
        if told is not None and key not in ('interval', *known):
            raise CheckpointError(f'{kind.__name__} has no {key}, got {told}')
        if told is not None and value not in (None, told):
            raise CheckpointError(f'{file} says that {key} of {name} is {value}, got {told}')
        found[key] = value if told is None else told
    asks = [key for key in ('momentum', 'gamma') if key in known] if scaled or not settings else []
    missing = [key for key in (*asks, 'interval') if found[key] is None]
    if missing:
        raise CheckpointError(
            f'{file} does not say how its average {name} was updated; `restart` takes '
            f'{" and ".join(f"--{key}" for key in missing)} (in Python as fields of Given)'
        )
    interval = found.pop('interval')
    arguments.update({key: value for key, value in found.items() if value is not None})
    try:
        average = kind(nn.Linear(1, 1), interval=interval, **arguments)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f'{name} in {file}: {error}') from None
    average.steps.fill_(begin.steps)
    average.restarts = begin.restarts
    return average


def _class_of(file, name, settings, schedule, given: Given) -> type:
    told = str(settings.get('ema_type', '')).rsplit('.', 1)[-1]
    asked = given.ema_type and given.ema_type.rsplit('.', 1)[-1]
    kind = BY_SCHEDULE.get(schedule) or BY_NAME.get(told)
    wanted = BY_NAME.get(asked)
    if asked and wanted is None:
        raise CheckpointError(
            f'--ema-type (ema_type) must be one of {", ".join(BY_NAME)}, got {asked!r}'
        )
    if kind and wanted not in (None, kind):
        raise CheckpointError(f'{file} says that {name} is a {kind.__name__}, got {asked}')
    if not (kind or wanted):
        what = f'its ema_type {told!r} is unknown' if told else 'its config has no EMAHook'
        raise CheckpointError(
            f'{file} does not say how its average {name} was updated ({what}); '
            f'`restart` takes --ema-type (ema_type of Given), one of {", ".join(BY_NAME)}'
        )
    return kind or wanted


def _check_end(average: Restartable, end: AverageFacts, name: str, file: FileFacts) -> None:
    """Raise CheckpointError unless an average has come to the state of the one in a file."""
    own = {'updates': int(average.steps), 'restarts': average.restarts}
    own.update(average.hyperparameters)
    real = {'updates': end.steps, 'restarts': end.restarts, **end.live}
    if not end.live:  # a class that saves its counter alone
        own = {'updates': own['updates']}
    wrong = [key for key, value in own.items() if real.get(key) != value]
    if wrong:
        text = ', '.join(f'{key} {own[key]:g} instead of {real.get(key)}' for key in wrong)
        raise CheckpointError(
            f'something changed the average {name} that {file} does not explain ({text}): a '
            'restart on a plateau or by hand, a changed config, or skipped steps of the optimizer. '
            'Take files between which nothing changed'
        )


def _restarts_between(before: FileFacts | None, after: FileFacts, name: str) -> list[Restart]:
    """Return the restarts of an average that its rules have done between two files."""
    groups: dict = {}
    rules_before = average_in(before, name).rules if before else ()
    known_before = [state.get('arguments') for state in rules_before]
    for state in average_in(after, name).rules:
        rule, done = _rule_of(state)
        for moment, momentum in _moments_done(rule, done).items():
            restart, at = restart_at(moment, momentum, rule, after.run), done.get(moment)
            if at is not None:  # a restart can be late, after a resume
                restart = replace(restart, iteration=at, update=after.run.update_of(at))
            if not (before.iteration if before else 0) <= restart.iteration < after.iteration:
                continue
            if at is None and before and rule.key not in known_before:
                raise CheckpointError(
                    f'{after} has a restart rule that {before} lacks, and does not say when the '
                    f'restart of {moment} was done: it may have been late'
                )
            groups.setdefault(restart.iteration, []).append(restart)
    restarts = [merged(groups[at]) for at in sorted(groups)]
    for restart in restarts:
        if restart.values.get('source') == 'best' and restart.values.get('steps') != 0:
            raise CheckpointError(
                f'between the files ({after} is the later) {name} went back to the best checkpoint '
                f'({listed(restart.causes)}): what it was made of is not known'
            )
    return restarts


def _rule_of(state: dict) -> tuple[RestartRule, dict]:
    """Return a rule and the moments that it has done, with iterations where the state has them."""
    try:
        rule = RestartRule(*ast.literal_eval(state['arguments']))
        moments = [Moment.parse(text) for text in state['done']]
        return rule, dict(zip(moments, state.get('done_at', repeat(None))))
    except (KeyError, TypeError, ValueError, SyntaxError) as error:
        raise CheckpointError(f'the state of a restart rule cannot be read: {error}') from None


def _moments_done(rule: RestartRule, done: Iterable[Moment]) -> dict:
    """Return all moments that a rule has done, with the momentum that each sets.

    Of ``every`` the state keeps the last multiple alone.
    """
    planned = rule.planned
    one = None if isinstance(rule.momentum, (list, tuple)) else rule.momentum
    moments = {moment: planned.get(moment, one) for moment in done}
    if rule.every:
        multiples = [m.at for m in done if m.unit == rule.unit and m.at % rule.every == 0]
        for at in range(rule.every, max(multiples, default=0), rule.every):
            moments.setdefault(Moment(rule.unit, at), one)
    return moments
