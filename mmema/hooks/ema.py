"""MMEngine's EMAHook, mended where it evaluates, saves or loads the wrong weights."""

from __future__ import annotations

from copy import copy
from functools import partial
from itertools import product
from pathlib import Path
from typing import Sequence

from mmengine.evaluator import Evaluator
from mmengine.hooks import EMAHook as StockEMAHook
from mmengine.model import BaseAveragedModel
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, ValLoop
from mmengine.runner.base_loop import BaseLoop
from torch import nn

from ..arguments import check_bool, check_choice, check_integer
from ..averages.choice import LadderChoice
from ..averages.config import DEFAULT_TYPE, AverageConfig, also_configs, ladder_configs
from ..averages.evaluation import EvaluatorView, evaluate_quietly, refuse_other_loops
from ..averages.tracked import TrackedAverage
from ..checkpoints.resume import check_ema_state, exchange_weights, share_extra_state
from ..messages import RunError, listed, warn
from ..registry import HOOKS
from ..run import (
    MAIN,
    RunFacts,
    auto_scale_base,
    batch_of_update,
    begin_part,
    checked_source,
    checkpoint_hooks,
    choose_checkpoint,
    ema_hook_of,
    facts_of,
    last_of,
    make_up_validation,
    now_of,
    refuse_late_ema_hook,
    refuse_unsaved,
    tell_what_is_lost,
    traits_of,
    what_loads,
)
from ..run.horizons import RAW, rungs_of
from ..run.metrics import prefixes_of
from ..swap import ShardedSwap, Swap, swap_in
from ..update.pairs import canonical_name, unwrapped
from ..update.staging import staged_once
from .monitor import relative_distance
from .optimizer_steps import OptimizerSteps
from .restart import EMARestartHook


@HOOKS.register_module()
class EMAHook(StockEMAHook):
    """:class:`mmengine.hooks.EMAHook` that never evaluates, saves or loads the wrong weights.

    What is different from MMEngine 0.10.7:

    - The average is made once in a run: ``test()`` after ``train()`` evaluates the trained one.
    - Until the first update it is a copy of the model, after ``init_weights`` and loading too,
      whatever the loaded file looks like and lacks.
    - A checkpoint is resumed by ``Runner.resume``, and loaded by ``Runner.load_checkpoint``, in a
      resumed run too. To resume, its EMA state must be whole. Where the last checkpoint was cut
      short, the run is resumed from the newest whole one.
    - An update belongs to a step of the optimizer: none while gradients are accumulated, none where
      mixed precision skips the step.
    - During an evaluation the model's tensors point to the average, which stays as it is; see
      :func:`mmema.averaged_weights`. Afterwards, also after an exception, they have the trained
      weights again. If the model was switched to deploy form meanwhile, it stays that way.
    - Validations and checkpoints report which tensors of the average are not finite.
    - ``FlexibleRunner`` trains, saves and resumes as ``Runner`` does, with one device, DDP,
      :class:`mmema.FullyShardStrategy` or :class:`mmema.DeepSpeedStrategy`. Other sharded models
      are refused.
    - Further averages can follow the same training, each as if it were alone. The main one is
      evaluated and saved as ``state_dict``; the others are saved in ``ema_also``, and evaluated by
      :class:`mmema.EMAValLoop`. A rewind of the training to its best checkpoint leaves them alone.

    Args:
        ema_type: Averaged model in the registry, or its class. Defaults to
            ``'mmema.RestartableExpMomentumEMA'``.
        strict_load: Whether keys that do not fit are an error when weights are loaded. Defaults to
            False.
        begin_iter: Iteration from which on the average is blended; until then it is copied.
            Defaults to 0.
        begin_epoch: The same in epochs; only one of the two can be set. Defaults to 0.
        per_optimizer_step: Whether updates follow the optimizer's steps rather than iterations.
            Defaults to True.
        also: Further averages by name, each a dict of ``ema_type``, ``horizon`` and arguments of
            the averaged model, which are otherwise those of the main one; and ``restart``, a dict
            of arguments of :class:`mmema.EMARestartHook` without ``source``. Defaults to None.
        horizon: In place of ``momentum``: ``'2 epochs'``, ``'500 updates'``, or 0.01, a share of
            the run. The momentum is ``interval / horizon`` in updates. ``'auto'`` is a ladder of
            averages of 0.3, 1, 3, 10 and 30 % of the run, a list one of your own: each validation
            chooses among them and the raw weights, see ``evaluate``. Defaults to None.
        evaluate: Weights that a validation of a ladder looks at. ``'neighbours'``: the chosen ones
            and those with the next shorter and longer horizon; the best of them is evaluated, saved
            and watched as the main average from then on. The last validation goes on until both
            neighbours are worse, and looks at the raw weights. ``'all'``: all. Defaults to
            ``'neighbours'``.
        base_batch_size: Batch size that momentum and gamma are chosen for. In a run with k times
            that batch, all ranks and accumulated iterations counted, they become
            ``1 - (1 - momentum) ** k`` and ``gamma / k``, but for values of restarts. Defaults to
            None: that of ``auto_scale_lr`` where it is enabled, else they stay.
        **averaged_model: Arguments of the averaged model, such as ``momentum``. With a horizon,
            ``interval='auto'`` is 1/100 of it in updates, at least 1: the shares of old weights
            differ by at most 1 % from those of an average that is blended at every update. A
            ladder has it unless ``interval`` is given, and ``update_buffers=True``.

    Raises:
        AssertionError: If ``begin_iter`` or ``begin_epoch`` is negative, or both are set.
        TypeError: If an argument is none of the hook's and none of the averaged model's.
        ValueError: If a value is out of range.

    Example:
        >>> custom_hooks = [dict(type='mmema.EMAHook', horizon='auto')]  # in a config
        >>> custom_hooks = [
        ...     dict(type='mmema.EMAHook', momentum=0.0002, also=dict(short=dict(momentum=0.001))),
        ... ]
    """

    def __init__(
        self,
        ema_type: str | type = DEFAULT_TYPE,
        strict_load: bool = False,
        begin_iter: int = 0,
        begin_epoch: int = 0,
        per_optimizer_step: bool = True,
        also: dict | None = None,
        horizon: str | float | Sequence[str | float] | None = None,
        base_batch_size: int | None = None,
        evaluate: str = 'neighbours',
        **averaged_model,
    ):
        super().__init__(ema_type, strict_load, begin_iter, begin_epoch, **averaged_model)
        check_bool('per_optimizer_step', per_optimizer_step)
        if base_batch_size is not None:
            check_integer('base_batch_size', base_batch_size)
        self.per_optimizer_step = per_optimizer_step
        self.base_batch_size = base_batch_size
        check_choice('evaluate', evaluate, ('neighbours', 'all'))
        # The ladder of a run, and the choice among its rungs; None for a single main average.
        self.ladder: LadderChoice | None = None
        rungs = ladder_configs(horizon, ema_type, averaged_model)
        if rungs:
            self._new_ladder = partial(
                LadderChoice, rungs_of(horizon), horizon == 'auto', evaluate == 'all'
            )
            self.ladder = self._new_ladder()
            averaged_model.pop('interval', None)
        elif evaluate != 'neighbours':
            raise ValueError(f"evaluate must come with horizon='auto' or a list, got {evaluate!r}")
        main = AverageConfig(ema_type, averaged_model, None if rungs else horizon)  # type: ignore
        others = also_configs(also, main)
        taken = [name for name in others if name in rungs]
        if taken:
            raise ValueError(f'a name in also must be none of the ladder, got {taken[0]!r}')
        # With a ladder the main average is one of its rungs.
        self.configs = {**(rungs or {MAIN: main}), **others}
        self.src_model: nn.Module | None = None
        self._averages: dict[str, TrackedAverage] = {}
        self._made_for: tuple = ()  # the run and the model
        self._optimizer_steps = OptimizerSteps()
        self._swap: Swap | ShardedSwap | None = None
        self._is_climbing = False  # in the validation that the run sees, not in a quiet one
        self._moved = False  # since the last validation began

    # --- the average and its source ---------------------------------------------------------------

    @property
    def ema_model(self) -> BaseAveragedModel | None:
        """The main averaged model; None before the run.

        Of a ladder the chosen rung; the lowest one while the raw weights are chosen.
        """
        return self._averages[self._main].ema_model if self._averages else None

    @property
    def _main(self) -> str:
        is_raw = self.ladder is not None and self.chosen == RAW
        return next(iter(self.ladder.rungs)) if is_raw else self.chosen

    @property
    def also(self) -> dict[str, BaseAveragedModel | None]:
        """The other averaged models by name, all rungs of a ladder first; None before the run."""
        averages = self._averages or dict.fromkeys(self.configs)
        return {name: one and one.ema_model for name, one in averages.items() if name != MAIN}

    @property
    def rungs(self) -> dict[str, BaseAveragedModel | None]:
        """The averaged models of a ladder by name; empty without one."""
        names = () if self.ladder is None else self.ladder.rungs
        return {name: one for name, one in self.also.items() if name in names}

    @property
    def chosen(self) -> str:
        """The name of the main weights: that of a rung or 'raw' with a ladder, else 'ema'."""
        return MAIN if self.ladder is None else self.ladder.chosen

    def candidates(self, last: bool = False) -> list[str]:
        """Return the weights that a validation may evaluate as the main ones."""
        if self.ladder is None:
            return [MAIN]
        return self.ladder.climb.candidates(last or self.ladder.evaluates_all)

    def before_run(self, runner: Runner) -> None:
        """Make the averages, unless this run has those of this model already."""
        self._restore()
        ema_hook_of(runner)  # refuses a second one
        base = self.base_batch_size or auto_scale_base(runner)
        in_units = base or any(config.horizon for config in self.configs.values())
        val_loop = getattr(runner, '_val_loop', None)
        trains = isinstance(runner._train_loop, BaseLoop)
        facts = facts_of(runner, self) if in_units and trains else None
        batch = batch_of_update(runner, facts) if base and facts else None
        source = self.src_model = checked_source(runner)
        if self._made_for != (runner, source):
            self._averages = {n: TrackedAverage(c, source, n) for n, c in self.configs.items()}
            if self.ladder is not None:
                self.ladder = self._new_ladder()
            self._made_for = (runner, source)
        if facts is not None:
            self._fit_ladder(val_loop, facts)
            for average in self._averages.values():
                average.settle(base, batch, facts)
        choose_checkpoint(runner)
        for loop in (val_loop, getattr(runner, '_test_loop', None)):
            guarded = getattr(getattr(loop, 'run', None), 'func', None) == self._run_and_restore
            if isinstance(loop, BaseLoop) and not guarded:
                loop.run = partial(self._run_and_restore, loop, loop.run)

    def _fit_ladder(self, val_loop: BaseLoop | None, facts: RunFacts) -> None:
        """Order the rungs by their horizons in this run, without those that are too short."""
        ladder = self.ladder
        if ladder is None or ladder.updates:
            return
        if isinstance(val_loop, BaseLoop):
            refuse_other_loops(val_loop)
        ladder.fit(facts)
        others = [n for n, c in self.configs.items() if c.blends_of_gamma is None]
        self._averages = {name: self._averages[name] for name in (*ladder.rungs, *others)}

    def after_run(self, runner: Runner) -> None:
        """Wait for the last checkpoint: the process may end now."""
        traits_of(runner).finish_saving()

    def _averages_of(self, runner: Runner) -> list[TrackedAverage]:
        """Return the averages; make them if a loop, a load or a save came before the run."""
        if not self._averages:
            self.before_run(runner)
        return [*self._averages.values()]

    def _source(self, runner: Runner) -> nn.Module:
        self.src_model = unwrapped(runner.model)  # found afresh: it may have been replaced
        return self.src_model

    # --- updates ----------------------------------------------------------------------------------

    def before_train(self, runner: Runner) -> None:
        """Copy the model; ``init_weights`` has run and the weights are loaded by now."""
        super().before_train(runner)
        refuse_unsaved(runner)
        refuse_late_ema_hook(runner)
        self._optimizer_steps = OptimizerSteps()
        source = self._source(runner)
        for average in self._averages.values():
            average.copy(source)
        begin_part([average.record for average in self._averages.values()], runner, self)
        if self.ladder is not None and self._never_validates(runner):
            runner.logger.warning(
                'EMAHook: this run has no validation, so nothing is chosen: the average of '
                f'{self.ladder.described(self.chosen)} is kept.'
            )
        if not isinstance(runner.train_loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
            return  # a loop of another library, of which nothing is known
        facts, evaluated = facts_of(runner, self), prefixes_of(runner.val_loop)
        for average in self._averages.values():
            average.begin(facts, evaluated)

    def before_train_epoch(self, runner: Runner) -> None:
        """Catch up on a validation that decides about a plateau or a ladder, after a resume."""
        for average in self._averages.values():
            average.restarts.catch_up(runner)
        self._catch_up(runner)

    def after_train(self, runner: Runner) -> None:
        """Log the scores of a ladder."""
        if self.ladder is not None:
            self._catch_up(runner)  # where the last validation was cut short
            runner.logger.info(self.ladder.table())

    @staticmethod
    def _never_validates(runner: Runner) -> bool:
        loop = runner.train_loop
        return runner.val_loop is None or getattr(loop, 'val_begin', 1) > last_of(loop)

    def _catch_up(self, runner: Runner) -> None:
        """Make the validation that the resumed checkpoint was saved before."""
        ladder = self.ladder
        if ladder is None or not ladder.just_resumed:
            return
        ladder.just_resumed = False
        make_up_validation(runner, [ladder.validated], 'EMAHook')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Copy weights that were loaded meanwhile; begin to count the optimizer's steps."""
        self._restore()  # if an evaluation without a guard has failed
        source = self._source(runner)
        for average in self._averages.values():
            average.copy(source)
            average.restarts.restart_if_due(runner)
        if self.per_optimizer_step:
            self._optimizer_steps.begin_iteration(runner.optim_wrapper)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        """Update the averages, if an optimizer has made a step."""
        steps, source = self._optimizer_steps, self._source(runner)
        stepped = not self.per_optimizer_step or steps.end_iteration(runner.optim_wrapper)
        begun = self._ema_started(runner)
        with staged_once():
            for average in self._averages.values():
                average.has_own_weights = True
                if stepped:
                    average.update(source, begun, runner.iter)
        if steps.missed and steps.epoch_over(epoch_length(runner)):
            self._refuse_standstill(source)

    def _refuse_standstill(self, source: nn.Module) -> None:
        """Raise RunError if the weights have moved and no step of an optimizer was seen."""
        # Where mixed precision has skipped every step so far, the average is right.
        if relative_distance(self.ema_model.module, source) != 0:
            raise RunError(
                'an average must follow the training, but the weights have changed and no '
                f'optimizer told of a step in {self._optimizer_steps.missed} iterations. Set '
                'per_optimizer_step=False in the EMAHook to update it at each iteration.'
            )

    # --- evaluation -------------------------------------------------------------------------------

    def before_val_epoch(self, runner: Runner) -> None:
        """Swap the averaged weights into the model."""
        self.before_test_epoch(runner)
        self._is_climbing = self.ladder is not None and isinstance(runner._train_loop, BaseLoop)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Restore the trained weights; decide about restarts of averages of ``also``."""
        self._is_climbing = False
        self._restore()
        if isinstance(runner._train_loop, BaseLoop):
            results = getattr(runner.val_loop, 'results', {})  # of EMAValLoop
            for name, average in self._averages.items():
                average.restarts.see_validation(runner, results.get(name, {}))

    def before_test_epoch(self, runner: Runner) -> None:
        """Swap the averaged weights into the model."""
        self._averages_of(runner)
        self._restore()
        self._report()
        self._show(runner, self.chosen)

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Restore the trained weights."""
        self._restore()

    def _show(self, runner: Runner, name: str) -> None:
        """Give the model the weights of this name until they are restored."""
        self._restore()
        average = self._averages.get(name)  # the raw weights have none
        if average is not None and average.has_own_weights:
            self._swap = swap_in(self._source(runner), average.ema_model)

    def _climb(self, loop: ValLoop, evaluator: Evaluator, metrics: dict) -> dict:
        """Choose among a ladder after the chosen weights were evaluated; see LadderChoice."""
        if not self._is_climbing:
            return metrics
        self._is_climbing = False
        runner, ladder, before = loop.runner, self.ladder, self.chosen
        quiet, now = copy(loop), now_of(runner)
        quiet.evaluator = evaluator

        def metrics_of(name: str) -> dict:
            known = getattr(loop, 'results', {}).get(name)  # of this validation, by EMAValLoop
            if known is not None:
                return known
            runner.logger.info(f'Evaluating the {name} weights ...')
            self._show(runner, name)
            return evaluate_quietly(quiet)

        last = now == last_of(runner.train_loop)
        metrics = ladder.choose(metrics, metrics_of, runner.hooks, now, last)
        self._show(runner, self.chosen)
        if self.chosen != before:
            self._moved = True
            loop.val_loss.clear()  # the losses of other weights
        scalars, names = runner.message_hub.log_scalars, ladder.climb.names
        for name, metric in product(names, ladder.measured):
            scalars.pop(f'val/{name}/{metric}', None)  # LoggerHook would write the last one again
        runner.message_hub.update_scalar('val/ema_chosen', names.index(self.chosen))
        return metrics

    def _save_again(self, runner: Runner) -> None:
        """Save the checkpoint of this moment again: it has the weights that were chosen before."""
        self._moved = False
        for hook in checkpoint_hooks(runner):
            step = runner.epoch if hook.by_epoch else runner.iter
            name = hook.filename_tmpl.format(step)
            # The hook of a run that was resumed does not know of a file that was saved before.
            last = hook.last_ckpt or runner.message_hub.runtime_info.get('last_ckpt')
            if Path(str(last)).name == name:
                meta = dict(epoch=runner.epoch, iter=runner.iter)
                hook._save_checkpoint_with_step(runner, step, meta)

    def _restore(self) -> None:
        swap, self._swap = self._swap, None
        if swap is not None and not swap.undo():
            for average in self._averages.values():
                average.has_own_weights = False
            warn(
                'the layers of the model were changed while it held the averaged weights (as '
                'switch_to_deploy does): it keeps them, and cannot be trained on.'
            )

    def _run_and_restore(self, loop, run, *args, **kwargs):
        evaluator = getattr(loop, 'evaluator', None)
        if self.ladder is not None:
            loop.evaluator = EvaluatorView(evaluator, partial(self._climb, loop, evaluator))
        try:
            result = run(*args, **kwargs)
        finally:  # no hook is called after an exception
            if self.ladder is not None:
                loop.evaluator = evaluator
            self._is_climbing = False
            self._restore()
        if self._moved:
            self._save_again(loop.runner)
        return result

    def _report(self) -> None:
        self._optimizer_steps.report()
        for average in self._averages.values():
            average.report()

    # --- checkpoints ------------------------------------------------------------------------------

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Save the averaged weights as ``state_dict``, the trained ones in ``ema_state_dict``."""
        averages, to_save = self._averages_of(runner), traits_of(runner).to_save
        self._report()
        if hasattr(runner, 'strategy'):
            # FlexibleRunner of MMEngine 0.10.7 leaves the prefix of the DDP wrapper in the names,
            # and where a validation saves, counts what is over once more: a resumed run skips one.
            checkpoint['state_dict'] = to_save(unwrapped(runner.model).state_dict())
            if not unwrapped(runner.model).training:
                checkpoint['meta'].update(epoch=runner.epoch, iter=runner.iter)
        try:
            if self._swap is None:
                for average in averages:
                    average.copy(self._source(runner))
        except ValueError as error:
            warn(f'the checkpoint is saved without an EMA state: {error}')
            return
        if self._swap is not None:
            checkpoint['state_dict'] = to_save(self._swap.trained_state())
        states = {average.name: average.state(to_save) for average in averages}
        # A copy: what is saved twice, here and in ema_also, keeps one storage in the file.
        state = copy(states[self._main]['state_dict'])
        if self.chosen == RAW:
            raw = {f'module.{canonical_name(k)}': t for k, t in checkpoint['state_dict'].items()}
            state.update({key: raw[key] for key in state if key in raw})
        checkpoint['ema_state_dict'] = state
        share_extra_state(checkpoint)
        exchange_weights(checkpoint)
        others = {name: state for name, state in states.items() if name != MAIN}
        if others:
            checkpoint['ema_also'] = others
        if self.ladder is not None:
            checkpoint['ema_auto'] = self.ladder.state_dict()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Resume the averages, or let them be copies of the loaded model."""
        self._restore()
        averages = self._averages_of(runner)
        (file, resumes), strict = what_loads(runner), self.strict_load
        if resumes and not any(isinstance(hook, EMARestartHook) for hook in runner.hooks):
            tell_what_is_lost(runner, checkpoint, file)
        if not resumes or 'ema_state_dict' not in checkpoint:
            if resumes:
                warn(
                    'There is no `ema_state_dict` in checkpoint. `EMAHook` will make a copy of '
                    f'`state_dict` as the initial `ema_state_dict` ({file})'
                )
            for average in averages:
                average.load(checkpoint, strict)
            return
        check_ema_state(checkpoint, self.ema_model, file)
        exchange_weights(checkpoint)
        main = {'state_dict': checkpoint['ema_state_dict']}
        saved = {MAIN: main, **checkpoint.get('ema_also', {})}
        new = [average.name for average in averages if average.name not in saved]
        for average in averages:
            if average.name in saved:
                average.resume(saved[average.name], unwrapped(runner.model), strict, file)
            else:
                average.load(checkpoint, strict)
        if new:
            begins = 'it begins as a copy' if len(new) == 1 else 'they begin as copies'
            which = 'average' if len(new) == 1 else 'averages'
            warn(f'{file} has no {which} {listed(new)}: {begins} of the weights')
        if self.ladder is not None and 'ema_auto' in checkpoint:
            self.ladder.load_state_dict(checkpoint['ema_auto'])
        dropped = [name for name in saved if name not in (*self._averages, MAIN)]
        if dropped:
            warn(f'{file} has averages that the config lacks; they are dropped: {listed(dropped)}')


def epoch_length(runner: Runner) -> int:
    """Return the iterations of an epoch, at most 1000: a set of data may be endless."""
    try:
        return min(len(runner.train_dataloader), 1000)
    except TypeError:
        return 1000
