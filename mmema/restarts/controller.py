"""Restarts of one average while a run goes on: when one is due, what it does, what the log says."""

from __future__ import annotations

from typing import Callable, Mapping

from mmengine.runner import Runner

from ..averaged import finish_copies
from ..messages import RunError
from ..restartable import Restartable
from ..run import MAIN, RunFacts, make_up_validation, now_of, scalars_of
from ..run.horizons import RAW
from ..update.pairs import unwrapped
from . import rewind
from .planner import Restart
from .progress import RuleProgress, due_restart
from .ranks import on_main
from .rule import RestartRule


class RestartController:
    """Restarts of one average of a run by any number of rules; it does nothing without one.

    Args:
        progresses: The states of its rules. What is due at one iteration makes one restart.
        name: Its name in the run. Defaults to that of the main average.
    """

    def __init__(self, progresses: list[RuleProgress], name: str = MAIN):
        self.progresses = progresses
        self.name = name
        self._best_files: list | None = None  # before the last validation or checkpoint

    def begin(
        self,
        ema: Restartable,
        facts: RunFacts,
        rungs: Mapping[str, Restartable] | None = None,
        chosen: Callable[[], str] | None = None,
    ) -> None:
        """Take in the average and the run of a training that begins or goes on.

        Args:
            ema: The average.
            facts: Those of the run.
            rungs: The averages that are restarted instead, by name, where ``ema`` is a ladder's.
            chosen: Tells which of the rungs' or the raw weights are chosen now.

        Raises:
            RunError: If a rule does not fit them.
        """
        self.ema, self.rungs, self._chosen = ema, dict(rungs or {}), chosen
        for progress in self.progresses:
            progress.begin(facts)
            if rungs:
                refuse_values(progress.rule)
            check_rule(progress.rule, ema)

    def catch_up(self, runner: Runner) -> None:
        """Make the validation that the resumed checkpoint was saved before, if a rule needs it.

        Its result decides about a plateau and the best checkpoint.
        """
        resumed = [progress for progress in self.progresses if progress.just_resumed]
        for progress in resumed:
            progress.just_resumed = False
        needing = [one for one in resumed if one.rule.plateau or one.rule.uses_best]
        make_up_validation(runner, [one.validated for one in needing], 'EMARestartHook')

    def see_validation(self, runner: Runner, metrics: dict) -> None:
        """Take in the metrics of a validation, which may make a restart due."""
        if not self.progresses:
            return
        now, self._best_files = now_of(runner), rewind.best_files(runner)
        for progress in self.progresses:
            progress.see_validation(metrics, now)

    def restart_if_due(self, runner: Runner) -> None:
        """Restart the average, if a trigger of any rule is due and not yet done."""
        now = {'epoch': runner.epoch, 'iter': runner.iter}
        due = [progress for progress in self.progresses if progress.is_due(now)]
        if not due:
            return
        ema, before = self.ema, values_of(self.ema)
        restart = due_restart(due, now, momentum_of(ema))
        weights = self._replace_weights(runner, restart, due)
        said = {'causes': list(restart.causes), 'iteration': runner.iter}
        said.update(source=restart.values.get('source', 'model'))
        for one in self.rungs.values() or [ema]:
            restart.apply(one)
            one.record.events[-1].update(said)
        after = values_of(ema)
        changes = ', '.join(f'{key} {before[key]:g} -> {after[key]:g}' for key in after)
        is_main = self.name == MAIN
        of = f' of {", ".join(self.rungs)}' if self.rungs else ''
        of = of if is_main else f' of {self.name!r}'
        runner.logger.info(
            f'EMA restart {ema.restarts}{of} at epoch '
            f'{runner.epoch}, iter {runner.iter} (due: {", ".join(restart.causes)}): {changes}'
            + (f'; training goes on from {weights}' if is_main else '')
        )
        prefix = scalars_of(self.name)
        runner.message_hub.update_scalar(f'{prefix}restarts', ema.restarts)
        for key, value in ema.hyperparameters.items():
            runner.message_hub.update_scalar(f'{prefix}set_{key}', float(value))

    def complete_best(self, runner: Runner, checkpoint: dict) -> None:
        """Complete a best checkpoint that is being saved, if a restart may go back to it."""
        if not any(progress.rule.uses_best for progress in self.progresses):
            return
        # CheckpointHook notes the name of a new best file, then saves it before any other.
        best_files = rewind.best_files(runner)
        if self._best_files not in (None, best_files):
            rewind.complete(runner, checkpoint)
        self._best_files = best_files

    def _replace_weights(self, runner: Runner, restart: Restart, due: list) -> str:
        """Give the model the weights that training goes on from; return which, in words."""
        model, source = unwrapped(runner.model), restart.values.get('source')
        best = self._best_copy(runner, restart, due) if source == 'best' else None
        finish_copies()
        name = MAIN if self._chosen is None else self._chosen()
        if source == 'ema' and runner.iter > 0 and name != RAW:  # before, it is of no weights
            self.rungs.get(name, self.ema).copy_to(model)
            weights = 'the averaged weights'
        elif best is not None:
            rewind.go_back(runner, self.rungs or {MAIN: self.ema}, best)
            weights = f'the best checkpoint ({best})'
        else:
            if source == 'best':
                runner.logger.warning('EMARestartHook: there is no best checkpoint to go back to')
            return 'the current weights'
        model.zero_grad()  # half accumulated, for weights that are gone
        return weights

    def _best_copy(self, runner: Runner, restart: Restart, due: list) -> str | None:
        users = [progress for progress in due if progress.rule.uses_best]
        # After a plateau the best one of the stage before, where a moment has ended one.
        if restart.iteration < 0 and users[-1].kept and users[-1].done:
            return users[-1].kept[-1]
        name, still_named = on_main(lambda: rewind.keep_best(runner))
        if name is not None:
            for progress in users:
                progress.kept.append(name)
            rewind.drop_kept(runner, self.progresses, still_named)
        return name


def check_rule(rule: RestartRule, ema: Restartable) -> None:
    """Raise a RunError unless an average can be restarted as a rule says."""
    after_plateau = rule.plateau and rule.plateau.momentum_after(momentum_of(ema))
    for momentum in (*rule.momenta, after_plateau):
        try:
            ema.check_restart(momentum=momentum, gamma=rule.gamma)
        except ValueError as error:
            raise RunError(str(error)) from None


def refuse_values(rule: RestartRule) -> None:
    """Raise RunError if a rule would change the horizons of a ladder."""
    plateau = rule.plateau
    after_plateau = plateau and plateau.momentum_after(0.5)
    if any(value is not None for value in (*rule.momenta, rule.gamma, after_plateau)):
        raise RunError(
            f'a restart of a ladder must leave the horizons as they are, got {rule}. Leave '
            'momentum and gamma out.'
        )


def momentum_of(ema: Restartable) -> float:
    """Return the average's own momentum; for one without, any: a change of it is refused."""
    return ema.hyperparameters.get('momentum', 0.5)


def values_of(ema: Restartable) -> dict:
    """Return the counter and the live values by name."""
    return {'steps': int(ema.steps), **ema.hyperparameters}
