"""The hook that restarts the average of a run."""

from __future__ import annotations

from typing import Sequence

from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop

from ..checkpoints.resume import check_ema_state
from ..messages import RunError
from ..registry import HOOKS, register_everywhere
from ..restartable import Restartable
from ..restarts import rewind
from ..restarts.advice import advice
from ..restarts.live import catch_up, check_rule, log_restart, momentum_of, on_main, values_of
from ..restarts.planner import Restart, plan
from ..restarts.progress import RuleProgress, due_restart
from ..restarts.rule import RestartRule
from ..run import choose_checkpoint, ema_hook_of, facts_of, now_of, traits_of, what_loads
from ..update.pairs import unwrapped


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
        self.progress = RuleProgress(self.rule)
        self._progresses: list = []  # of all restart hooks, in the first of them
        self._best_files: list = []

    def before_run(self, runner: Runner) -> None:
        """Choose the file to resume from, before MMEngine opens it."""
        choose_checkpoint(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check the EMA state of a run to be resumed, and take over the state of the rule."""
        file, resumes = what_loads(runner)
        if not resumes:
            return
        ema = getattr(ema_hook_of(runner), 'ema_model', None)
        if ema is not None:  # FlexibleRunner loads before the average is made
            check_ema_state(checkpoint, ema, file)
        hooks, states = restart_hooks_of(runner), checkpoint.get('ema_restart', [])
        keys, place = [hook.rule.key for hook in hooks], hooks.index(self)
        own = [state for state in states if state['arguments'] == self.rule.key]
        # Without one, the state in its place, of a config that was changed.
        own += [state for state in states[place : place + 1] if state['arguments'] not in keys]
        if own:
            self.progress.load_state_dict(own[0])

    def before_train(self, runner: Runner) -> None:
        """Plan the run, check it, and give advice; the first restart hook acts for all of them."""
        hooks = restart_hooks_of(runner)
        if self is not hooks[0]:
            return
        ema_hook = ema_hook_of(runner)
        self._ema = ema = ema_hook.ema_model
        if not isinstance(ema, Restartable):
            raise RunError(
                f'EMARestartHook needs a restartable average, got {type(ema).__name__}. Set '
                "ema_type='mmema.RestartableExpMomentumEMA' in the EMAHook."
            )
        rules, facts = [hook.rule for hook in hooks], facts_of(runner, ema_hook)
        refuse_sources(runner, rules)
        planned = plan(rules, facts)
        self._progresses = [hook.progress for hook in hooks]
        for progress in self._progresses:
            check_rule(progress.rule, ema)
            progress.begin(facts)
        self._best_files = rewind.best_files(runner)
        for line in advice(rules, planned, facts, ema):
            runner.logger.warning(f'EMARestartHook: {line}')

    def before_train_epoch(self, runner: Runner) -> None:
        """Catch up on a validation which the resumed checkpoint was saved before."""
        catch_up(runner, self.progress)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Restart if a trigger of any hook is due and not yet done."""
        now = {'epoch': runner.epoch, 'iter': runner.iter}
        due = [progress for progress in self._progresses if progress.is_due(now)]
        if due:
            self._restart(runner, due, now)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Decide about a plateau, unless the validation is outside of training."""
        if isinstance(runner._train_loop, BaseLoop):
            self.progress.see_validation(metrics or {}, now_of(runner))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Save the state of the rule, and complete the best checkpoint."""
        checkpoint.setdefault('ema_restart', []).append(self.progress.state_dict())
        # CheckpointHook notes the name of a new best file, then saves it before any other.
        best_files = rewind.best_files(runner)
        if best_files != self._best_files and any(p.rule.uses_best for p in self._progresses):
            rewind.complete(runner, checkpoint)
        self._best_files = best_files

    def _restart(self, runner: Runner, progresses: list, now: dict) -> None:
        ema, model, weights = self._ema, unwrapped(runner.model), None
        before = values_of(ema)
        restart = due_restart(progresses, now, momentum_of(ema))
        source = restart.values.get('source')
        if source == 'ema' and runner.iter > 0:  # before, the average is of no weights
            ema.copy_to(model)
            weights = 'the averaged weights'
        elif source == 'best':
            name = self._best_copy(runner, restart, progresses)
            if name is None:
                runner.logger.warning('EMARestartHook: there is no best checkpoint to go back to')
            else:
                rewind.go_back(runner, ema, name)
                weights = f'the best checkpoint ({name})'
        if weights is not None:
            model.zero_grad()  # half accumulated, for weights that are gone
        restart.apply(ema)
        end = f'; training goes on from {weights or "the current weights"}'
        log_restart(runner, ema, restart, before, end=end)

    def _best_copy(self, runner: Runner, restart: Restart, progresses: list) -> str | None:
        users = [progress for progress in progresses if progress.rule.uses_best]
        # After a plateau the best one of the stage before, where a moment has ended one.
        if restart.iteration < 0 and users[-1].kept and users[-1].done:
            return users[-1].kept[-1]
        name, still_named = on_main(lambda: rewind.keep_best(runner))
        if name is not None:
            for progress in users:
                progress.kept.append(name)
            rewind.drop_kept(runner, self._progresses, still_named)
        return name


def refuse_sources(runner: Runner, rules: list) -> None:
    """Raise RunError if a restart is to replace weights of which the optimizer trains a copy."""
    if not traits_of(runner).trains_a_copy:
        return
    for rule in rules:
        for source in {rule.source, rule.plateau and rule.plateau.source} - {None, 'model'}:
            raise RunError(
                f"with {type(runner.strategy).__name__} source must be 'model', got {source!r}: it "
                'trains a copy of the weights that belongs to the optimizer.'
            )


def restart_hooks_of(runner: Runner) -> list:
    """Return the restart hooks of a run, in the order in which they are called."""
    return [hook for hook in runner.hooks if isinstance(hook, EMARestartHook)]
