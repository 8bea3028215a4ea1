"""The hook that restarts the average of a run."""

from __future__ import annotations

import math
from typing import Sequence

from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmengine.runner.base_loop import BaseLoop

from ..checkpoints.resume import check_ema_state
from ..messages import RunError, warn
from ..registry import HOOKS, register_everywhere
from ..restartable import Restartable
from ..restarts.advice import advice
from ..restarts.controller import RestartController
from ..restarts.planner import plan
from ..restarts.progress import RuleProgress
from ..restarts.rule import RestartRule
from ..run import (
    MAIN,
    begin_part,
    choose_checkpoint,
    ema_hook_of,
    facts_of,
    refuse_late_ema_hook,
    tell_what_is_lost,
    traits_of,
    validations_of,
    what_loads,
)


@register_everywhere(HOOKS)
class EMARestartHook(Hook):
    """Hook that restarts the schedule of the run's average, and says so in the log.

    Works beside any EMAHook, stock or ours, whose average is restartable
    (``ema_type='mmema.RestartableExpMomentumEMA'``). At least one trigger is needed; several
    compose, and those that fall on one iteration make one restart, of several hooks, too: a value
    that one of them does not set is taken from the other. A trigger is due from its moment on until
    it is done, so a run resumed past it restarts, once.

    Args:
        milestones: Epochs (iterations with ``by_epoch=False``) by 0-based index before which a
            restart takes place, as ``PipelineSwitchHook.switch_epoch`` counts. Defaults to None.
        every: Restart after every so many epochs or iterations. Defaults to None.
        by_epoch: Whether ``milestones`` and ``every`` count epochs. Defaults to True.
        follow: ``'PipelineSwitchHook'``, ``'YOLOXModeSwitchHook'`` or MMPretrain's
            ``'SwitchRecipeHook'``: restart when that hook of the run switches. Defaults to None.
        on_plateau: Restart when a metric stops improving; the arguments of
            :class:`mmema.restarts.plateau.Plateau`. Defaults to None.
        steps: 0, a hard restart; above 0, a soft one; None, the counter goes on. See
            ``RestartableExpMomentumEMA.restart``. Defaults to 0.
        momentum: New momentum in (0, 1), one value or one for each milestone. Defaults to None, as
            it is.
        gamma: New gamma in updates. Defaults to None, as it is.
        source: The weights that training goes on from. ``'model'``: those that it has. ``'ema'``:
            the averaged ones. ``'best'``: model, average, optimizer and AMP scaler of the best
            checkpoint so far, kept as ``best_before_restart_at_*.pth`` in the work folder as long
            as a resume can need it; epoch, data order and learning rate go on. Defaults to
            ``'model'``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or there is no trigger.

    Example:
        >>> custom_hooks = [
        ...     dict(type='EMAHook', ema_type='mmema.RestartableExpMomentumEMA'),
        ...     dict(type='mmema.EMARestartHook', follow='PipelineSwitchHook', gamma=500),
        ... ]
    """

    # Before any EMAHook, to check the state of a checkpoint before it is loaded.
    priority = 'HIGH'

    def __init__(
        self,
        milestones: Sequence[int] | None = None,
        every: int | None = None,
        by_epoch: bool = True,
        follow: str | None = None,
        on_plateau: dict | None = None,
        steps: int | None = 0,
        momentum: float | Sequence[float] | None = None,
        gamma: float | None = None,
        source: str = 'model',
    ):
        self.rule = RestartRule(
            milestones, every, by_epoch, follow, on_plateau, steps, momentum, gamma, source
        )
        self._runner: Runner | None = None
        self._begin(None)

    def _begin(self, runner: Runner | None) -> None:
        """Forget the run before, if this is another one: an object may serve several."""
        if runner is None or runner is not self._runner:
            self._runner = runner
            self.progress = RuleProgress(self.rule)
            # The first of several restart hooks acts for all of them; the others have none.
            self._controller: RestartController | None = None

    def before_run(self, runner: Runner) -> None:
        """Choose the file to resume from, before MMEngine opens it."""
        self._begin(runner)
        choose_checkpoint(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check the EMA state of a run to be resumed, and take over the state of the rule."""
        self._begin(runner)  # FlexibleRunner loads before it calls before_run
        file, resumes = what_loads(runner)
        if not resumes:
            return
        ema = getattr(ema_hook_of(runner), 'ema_model', None)
        if ema is not None:  # FlexibleRunner loads before the average is made
            check_ema_state(checkpoint, ema, file)
        hooks, states = restart_hooks_of(runner), checkpoint.get('ema_restart', [])
        keys, place = [hook.rule.key for hook in hooks], hooks.index(self)
        if place == 0:
            tell_what_is_lost(runner, checkpoint, file)
        own = [state for state in states if state['arguments'] == self.rule.key]
        # Without one, the state in its place, of a config that was changed.
        own += [state for state in states[place : place + 1] if state['arguments'] not in keys]
        if own:
            self.progress.load_state_dict(own[0])

    def before_train(self, runner: Runner) -> None:
        """Plan the run, check it, and give advice."""
        hooks = restart_hooks_of(runner)
        if self is not hooks[0]:
            return
        ema_hook = ema_hook_of(runner)
        ema, facts = ema_hook.ema_model, facts_of(runner, ema_hook)
        if not isinstance(ema, Restartable):
            raise RunError(
                f'EMARestartHook needs a restartable average, got {type(ema).__name__}. Set '
                "ema_type='mmema.RestartableExpMomentumEMA' in the EMAHook."
            )
        rules = [hook.rule for hook in hooks]
        refuse_late_ema_hook(runner)
        rare = _check_plateaus(rules, runner)
        if traits_of(runner).trains_a_copy:
            refuse_sources(rules, type(runner.strategy).__name__)
        planned = plan(rules, facts)
        self._controller = RestartController([hook.progress for hook in hooks])
        rungs = getattr(ema_hook, 'rungs', {})  # of a ladder
        self._controller.begin(ema, facts, rungs, lambda: getattr(ema_hook, 'chosen', MAIN))
        self._tells_iterations = not hasattr(ema_hook, 'also')  # MMEngine's hook does not
        if self._tells_iterations:
            begin_part([ema.record], runner, ema_hook)
        for line in [*rare, *advice(rules, planned, facts, ema)]:
            warn(f'EMARestartHook: {line}')

    def before_train_epoch(self, runner: Runner) -> None:
        """Catch up on a validation which the resumed checkpoint was saved before."""
        if self._controller is not None:
            self._controller.catch_up(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Restart if a trigger of any hook is due and not yet done."""
        if self._controller is not None:
            self._controller.restart_if_due(runner)
            if self._tells_iterations:
                self._controller.ema.record.iteration = runner.iter

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Decide about a plateau, unless the validation is outside of training."""
        if self._controller is not None and isinstance(runner._train_loop, BaseLoop):
            self._controller.see_validation(runner, metrics or {})

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Save the state of the rule, and complete the best checkpoint."""
        checkpoint.setdefault('ema_restart', []).append(self.progress.state_dict())
        if self._controller is not None:
            self._controller.complete_best(runner, checkpoint)


def refuse_sources(rules: list, strategy: str) -> None:
    """Raise RunError if a restart is to replace weights of which the optimizer trains a copy."""
    for rule in rules:
        for source in {rule.source, rule.plateau and rule.plateau.source} - {None, 'model'}:
            raise RunError(
                f"with {strategy} source must be 'model', got {source!r}: it trains a copy of the "
                'weights that belongs to the optimizer.'
            )


def _check_plateaus(rules: list, runner: Runner) -> list:
    """Return a line for each plateau that too few validations can show.

    Raises:
        RunError: If there is a plateau to be watched, and no validation at all.
    """
    plateaus = [rule.plateau for rule in rules if rule.plateau]
    if plateaus and runner.val_loop is None:
        raise RunError(
            f'on_plateau watches {plateaus[0].metric!r}, a metric of validations, but this run has '
            'none. Set val_dataloader, val_cfg and val_evaluator, or leave on_plateau out.'
        )
    known = isinstance(runner.train_loop, (EpochBasedTrainLoop, IterBasedTrainLoop))
    number = validations_of(runner.train_loop) if plateaus and known else math.inf
    return [
        f'on_plateau of {plateau.metric!r} with patience={plateau.patience} is seen at the '
        f'{plateau.patience + 1}th validation at the earliest, but this run has {number} before '
        'its end: no restart will come of it'
        for plateau in plateaus
        if number <= plateau.patience
    ]


def restart_hooks_of(runner: Runner) -> list:
    """Return the restart hooks of a run, in the order in which they are called."""
    return [hook for hook in runner.hooks if isinstance(hook, EMARestartHook)]
