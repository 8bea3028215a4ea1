"""Restarts of an average while a run goes on: checks, log, and decisions of rank 0."""

from __future__ import annotations

from typing import Callable

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.runner import Runner

from ..messages import RunError
from ..restartable import Restartable
from ..run import now_of, validation_follows
from .planner import Restart
from .rule import RestartRule


def check_rule(rule: RestartRule, ema: Restartable) -> None:
    """Raise a RunError unless an average can be restarted as a rule says."""
    after_plateau = rule.plateau and rule.plateau.momentum_after(momentum_of(ema))
    for momentum in (*rule.momenta, after_plateau):
        try:
            ema.check_restart(momentum=momentum, gamma=rule.gamma)
        except ValueError as error:
            raise RunError(str(error)) from None


def momentum_of(ema: Restartable) -> float:
    """Return the average's own momentum; for one without, any: a change of it is refused."""
    return ema.hyperparameters.get('momentum', 0.5)


def values_of(ema: Restartable) -> dict:
    """Return the counter and the live values by name."""
    return {'steps': int(ema.steps), **ema.hyperparameters}


def log_restart(
    runner: Runner, ema: Restartable, restart: Restart, before: dict, name: str = '', end: str = ''
) -> None:
    """Write a restart that was made into the log and, as scalars, into the curves.

    ``before`` is what :func:`values_of` gave before it, ``name`` the average's in ``also``.
    """
    after = values_of(ema)
    changes = ', '.join(f'{key} {before[key]:g} -> {after[key]:g}' for key in after)
    runner.logger.info(
        f'EMA restart {ema.restarts}{name and f" of {name!r}"} at epoch {runner.epoch}, iter '
        f'{runner.iter} (due: {", ".join(restart.causes)}): {changes}{end}'
    )
    prefix = f'train/ema_{name}_' if name else 'train/ema_'
    runner.message_hub.update_scalar(f'{prefix}restarts', ema.restarts)
    for key, value in ema.hyperparameters.items():
        runner.message_hub.update_scalar(f'{prefix}set_{key}', float(value))


def catch_up(runner: Runner, progress) -> None:
    """Catch up on a validation which the resumed checkpoint was saved before.

    Its result decides about a plateau and the best checkpoint; MMEngine would leave it out.
    """
    resumed, progress.just_resumed = progress.just_resumed, False
    if not resumed or runner.val_loop is None:
        return
    now, rule = now_of(runner), progress.rule
    missed = progress.validated != now and validation_follows(runner.train_loop, now)
    if missed and (rule.plateau or rule.uses_best):
        runner.logger.info('EMARestartHook: the validation before the resume comes first')
        runner.val_loop.run()


def on_main(decide: Callable):
    """Return on every rank what ``decide()`` returns, or raises, on rank 0."""
    try:
        answer = [decide() if is_main_process() else None, None]
    except Exception as error:  # the other ranks wait for an answer, so they get this one
        answer = [None, error]
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
