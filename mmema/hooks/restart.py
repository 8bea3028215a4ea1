"""When the schedule of an average is restarted, and what training goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from mmengine.dist import barrier, broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop
from mmengine.runner.base_loop import BaseLoop

from ..arguments import check_positive, count, flag, one_of
from ..averaged import Restartable
from ..checkpoints.resume import check_ema_state, checkpoint_to_resume, is_whole
from ..registry import HOOKS, register_everywhere
from ..restarts import rewind
from ..restarts.advice import advice, plan_of
from ..restarts.moments import (
    FOLLOWED,
    at_of,
    checked_milestones,
    checked_momentum,
    now_of,
    switch_epochs,
    unit_of,
)
from ..restarts.plateau import plateau_of
from ..restarts.rewind import SOURCES
from ..run import ema_hook_of, validation_follows, what_loads
from ..update.pairs import unwrapped

CURRENT_WEIGHTS = 'the current weights'
NEVER = {'epoch': float('inf'), 'iter': float('inf')}


@register_everywhere(HOOKS)
class EMARestartHook(Hook):
    """Restart the schedule of the run's average, and say so.

    Works beside any EMAHook, stock or ours, whose average is restartable
    (``ema_type='mmema.RestartableExpMomentumEMA'``). At least one trigger is needed; several
    compose, and those that fall on one moment make one restart. A trigger is due from its moment on
    until it is done, so a run resumed past it restarts, once.

    Args:
        milestones: Epochs (iterations with ``by_epoch=False``) by 0-based index before which a
            restart takes place, as ``PipelineSwitchHook.switch_epoch`` counts. Defaults to None.
        every: Restart after every so many epochs or iterations. Defaults to None.
        by_epoch: Whether ``milestones`` and ``every`` count epochs. Defaults to True.
        follow: ``'PipelineSwitchHook'`` or ``'YOLOXModeSwitchHook'``: restart when that hook of
            the run switches. Defaults to None.
        on_plateau: Restart when a metric stops improving; the arguments of
            :class:`mmema.hooks.plateau.Plateau`. Defaults to None.
        steps: 0, a hard restart; above 0, a soft one; None, the counter goes on. See
            ``RestartableExpMomentumEMA.restart``. Defaults to 0.
        momentum: New momentum in (0, 1), one value or one for each milestone. Defaults to None, as
            it is.
        gamma: New gamma in updates. Defaults to None, as it is.
        source: What training goes on from. ``'model'``: the weights that it has. ``'ema'``: the
            averaged weights. ``'best'``: model, average, optimizer and AMP scaler of the best
            checkpoint so far, kept as ``best_before_restart_at_*.pth`` in the work folder; epoch,
            data order and learning rate go on. Defaults to ``'model'``.

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
        self.milestones = checked_milestones(milestones)
        self.every = None if every is None else count('every', every)
        self.by_epoch = flag('by_epoch', by_epoch)
        self.follow = None if follow is None else one_of('follow', follow, FOLLOWED)
        self.plateau = None if on_plateau is None else plateau_of(on_plateau)
        if not (self.milestones or every or follow or on_plateau):
            raise ValueError(
                'EMARestartHook must have a trigger, got none of milestones, every, follow and '
                'on_plateau'
            )
        self.steps = None if steps is None else count('steps', steps, least=0)
        self.momentum = checked_momentum(momentum, self.milestones, alone=not (every or follow))
        check_positive('gamma', gamma)
        self.gamma = gamma
        self.source = one_of('source', source, SOURCES)
        changes = (momentum, gamma, self.plateau and self.plateau.momentum_add)
        if self.plateau and self.plateau.after_restart and not (self.milestones or every or follow):
            raise ValueError(
                "on_plateau['after_restart'] must come with another trigger, got none: nothing "
                'would ever begin it'
            )
        if steps is None and source == 'model' and not any(changes):
            raise ValueError(
                'a restart with steps=None must change momentum, gamma or source, got none of them'
            )
        # What a checkpoint knows this hook by.
        self.arguments = repr(
            (milestones, every, by_epoch, follow, on_plateau, steps, momentum, gamma, source)
        )
        self.moments: dict[str, float | None] = {}  # each with the momentum that it sets
        self.done: list[str] = []
        self.plateau_due = False
        self.kept: str | None = None
        self.validated: int | None = None
        self._just_resumed = False
        self._next = dict(NEVER)

    # --- the start of a run ---------------------------------------------------------------------

    def before_run(self, runner) -> None:
        """Choose the file to resume from, before MMEngine opens it."""
        if not runner._resume:
            return
        if runner._load_from is None:
            runner._load_from = checkpoint_to_resume(runner.work_dir)
        elif Path(runner._load_from).is_file() and not is_whole(runner._load_from):
            raise ValueError(
                f'{runner._load_from} is cut short: the run was stopped while writing it. Resume '
                'without a file name to take the newest whole checkpoint.'
            )

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Check the EMA state of a run to be resumed, and take over what was done."""
        file, resumes = what_loads(runner)
        if not resumes:
            return
        check_ema_state(checkpoint, self._ema(runner), file)
        state = self._own_state(runner, checkpoint.get('ema_restart', []))
        if state is None:
            return
        self.done = list(state['done'])
        self.plateau_due = state['plateau_due']
        self.kept = state['kept']
        self.validated = state['validated']
        if self.plateau and state['plateau']:
            self.plateau.load_state_dict(state['plateau'])
        self._just_resumed = True

    def _own_state(self, runner, states: list[dict]) -> dict | None:
        """Return what this hook saved: the state with its arguments, else the one in its place."""
        hooks = restart_hooks_of(runner)
        known = {state['arguments']: state for state in states}
        if self.arguments in known:
            return known[self.arguments]
        place = hooks.index(self)
        if place >= len(states) or states[place]['arguments'] in {h.arguments for h in hooks}:
            return None
        return states[place]

    def before_train(self, runner) -> None:
        """Work out the moments, check what can be known now, and give advice."""
        ema = self._ema(runner)
        self.moments = self._moments(runner)
        self._look_ahead()
        plateau_momentum = self.plateau and self.plateau.momentum_after(momentum_of(ema))
        for momentum in (*self.moments.values(), plateau_momentum):
            self._check_live(ema, self._live(momentum))
        if self.uses_best() and not rewind.saves_best(runner):
            runner.logger.warning(
                "EMARestartHook: source='best' finds no best checkpoint in this run, so restarts "
                'go on from the current weights. Set default_hooks.checkpoint.save_best.'
            )
        if self is restart_hooks_of(runner)[-1]:  # all of them know their moments by now
            for line in advice(plan_of(runner, ema, restart_hooks_of(runner))):
                runner.logger.warning(f'EMARestartHook: {line}')

    def _moments(self, runner) -> dict[str, float | None]:
        loop, unit = runner.train_loop, 'epoch' if self.by_epoch else 'iter'
        iterations = isinstance(loop, IterBasedTrainLoop)
        if iterations and (self.follow or (self.by_epoch and (self.milestones or self.every))):
            raise ValueError(
                'a trigger by epoch must be in a run by epochs, got one by iterations. Set '
                'by_epoch=False and give iterations.'
            )
        each = isinstance(self.momentum, (list, tuple))
        values = self.momentum if each else [self.momentum] * len(self.milestones)
        moments = {f'{unit} {at}': value for at, value in zip(self.milestones, values)}
        end = loop.max_epochs if self.by_epoch else loop.max_iters
        one = None if each else self.momentum
        if self.every:
            moments.update({f'{unit} {at}': one for at in range(self.every, end, self.every)})
        if self.follow:
            moments.update({f'epoch {at}': one for at in switch_epochs(runner, self.follow)})
        return moments

    # --- training -------------------------------------------------------------------------------

    def before_train_epoch(self, runner) -> None:
        """Catch up on a validation which the resumed checkpoint was saved before.

        Its result decides about a plateau and the best checkpoint; MMEngine would leave it out.
        """
        if not self._just_resumed:
            return
        self._just_resumed = False
        wanted = self.plateau or self.uses_best()
        now = now_of(runner)
        missed = self.validated != now and validation_follows(runner.train_loop, now)
        if wanted and missed and runner.val_loop is not None:
            runner.logger.info('EMARestartHook: the validation before the resume comes first')
            runner.val_loop.run()

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Restart if a trigger is due and not yet done."""
        now = {'epoch': runner.epoch, 'iter': runner.iter}
        if self.plateau_due or any(now[unit] >= at for unit, at in self._next.items()):
            due = [m for m in self.moments if m not in self.done and now[unit_of(m)] >= at_of(m)]
            self._restart(runner, due)
            self._look_ahead()

    def _look_ahead(self) -> None:
        """Note the next moment of each unit, so that an iteration without one costs nothing."""
        self._next = dict(NEVER)
        for moment in set(self.moments).difference(self.done):
            unit = unit_of(moment)
            self._next[unit] = min(self._next[unit], at_of(moment))

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        """Decide on rank 0 about a plateau, and tell the other ranks."""
        if not isinstance(runner._train_loop, BaseLoop):
            return  # a validation outside of training
        self.validated = now_of(runner)
        if self.plateau is None:
            return
        self.plateau_due |= self._on_main(lambda: self._is_plateau(metrics or {}))

    def _is_plateau(self, metrics: dict) -> bool:
        counting = bool(self.done) or not self.plateau.after_restart
        return self.plateau.watch(metrics, counting)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Save what is done beside the EMA state."""
        state = dict(
            arguments=self.arguments,
            done=list(self.done),
            plateau_due=self.plateau_due,
            plateau=self.plateau.state_dict() if self.plateau else None,
            kept=self.kept,
            validated=self.validated,
        )
        checkpoint.setdefault('ema_restart', []).append(state)
        if self.uses_best():
            rewind.complete(runner, checkpoint)

    # --- the restart ----------------------------------------------------------------------------

    def _restart(self, runner, due: list[str]) -> None:
        ema = self._ema(runner)
        before = live_of(ema)
        momentum = self.moments[due[-1]] if due else self.plateau.momentum_after(momentum_of(ema))
        live = self._live(momentum)
        source = self.source if due else self.plateau.source or self.source
        gone_on_from = self._go_on_from(runner, ema, source, ends_stage=bool(due))
        if gone_on_from != CURRENT_WEIGHTS:
            unwrapped(runner.model).zero_grad()  # half accumulated, for weights that are gone
        if self.steps is None and not live:
            live = {ema._LIVE[0]: getattr(ema, ema._LIVE[0])}  # only the source changes
        ema.restart(self.steps, **live)
        self.done += due
        self.plateau_due = False
        why = ', '.join(due) if due else f'{self.plateau.metric} stopped improving'
        changes = ', '.join(
            f'{name} {before[name]:g} -> {value:g}' for name, value in live_of(ema).items()
        )
        runner.logger.info(
            f'EMA restart {ema.restarts} at epoch {runner.epoch}, iter {runner.iter} (due: {why}): '
            f'{changes}; training goes on from {gone_on_from}'
        )
        runner.message_hub.update_scalar('train/ema_restarts', ema.restarts)
        for name in ema._LIVE:
            runner.message_hub.update_scalar(f'train/ema_set_{name}', float(getattr(ema, name)))

    def _go_on_from(self, runner, ema, source: str, ends_stage: bool) -> str:
        """Put the weights in place; return what they are, for the log."""
        if source == 'ema' and runner.iter > 0:  # before, the average is of no weights at all
            ema.copy_to(unwrapped(runner.model))
            return 'the averaged weights'
        if source == 'best':
            # Plateaus go back to the best one of the stage before, where another trigger ended one.
            if ends_stage or self.kept is None or not self.done:
                moment = f'iter {runner.iter}'
                self.kept = self._on_main(lambda: rewind.keep_best(runner, moment))
            if self.kept is not None:
                barrier()  # the file is whole before any rank opens it
                rewind.go_back(runner, ema, rewind.kept_file(runner, self.kept))
                return f'the best checkpoint ({self.kept})'
            runner.logger.warning('EMARestartHook: there is no best checkpoint to go back to')
        return CURRENT_WEIGHTS

    # --- small things ---------------------------------------------------------------------------

    def _live(self, momentum: float | None) -> dict:
        live = {'momentum': momentum, 'gamma': self.gamma}
        return {name: value for name, value in live.items() if value is not None}

    @staticmethod
    def _check_live(ema: Restartable, live: dict) -> None:
        unknown = sorted(set(live) - set(ema._LIVE))
        if unknown:
            raise ValueError(
                f'a restart can only change what {type(ema).__name__} has, got {unknown[0]}; it '
                f'has {", ".join(ema._LIVE)}'
            )
        ema.check_hyperparameters(**live)

    def uses_best(self) -> bool:
        return 'best' in (self.source, self.plateau and self.plateau.source)

    @staticmethod
    def _ema(runner) -> Restartable:
        ema = ema_hook_of(runner).ema_model
        if not isinstance(ema, Restartable):
            raise ValueError(
                f'EMARestartHook needs a restartable average, got {type(ema).__name__}. Set '
                "ema_type='mmema.RestartableExpMomentumEMA' in the EMAHook."
            )
        return ema

    @staticmethod
    def _on_main(decide):
        """Return on every rank what ``decide()`` returns, or raises, on rank 0."""
        answer = [None, None]
        if is_main_process():
            try:
                answer[0] = decide()
            except Exception as error:  # the other ranks wait for an answer, so they get this one
                answer[1] = error
        broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]


def restart_hooks_of(runner) -> list[EMARestartHook]:
    return [hook for hook in runner.hooks if isinstance(hook, EMARestartHook)]


def live_of(ema: Restartable) -> dict[str, float]:
    return {'steps': int(ema.steps), **{name: getattr(ema, name) for name in ema._LIVE}}


def momentum_of(ema: Restartable) -> float:
    """Return the average's own momentum; for one without, any: a change of it is refused."""
    return getattr(ema, 'momentum', 0.5)
