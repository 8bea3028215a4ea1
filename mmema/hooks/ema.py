"""MMEngine's EMAHook, mended where it evaluates, saves or loads the wrong weights."""

from __future__ import annotations

from functools import partial

from mmengine.hooks import EMAHook as StockEMAHook
from mmengine.model import BaseAveragedModel
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop
from torch import nn

from ..arguments import check_bool, check_integer
from ..averages.config import AverageConfig, also_configs
from ..averages.tracked import TrackedAverage
from ..checkpoints.resume import check_ema_state, exchange_weights
from ..messages import listed, warn
from ..registry import HOOKS
from ..run import (
    MAIN,
    auto_scale_base,
    batch_of_update,
    begin_part,
    checked_source,
    choose_checkpoint,
    ema_hook_of,
    facts_of,
    refuse_unsaved,
    traits_of,
    what_loads,
)
from ..run.metrics import prefixes_of
from ..swap import ShardedSwap, Swap, swap_in
from ..update.pairs import unwrapped
from ..update.staging import staged_once
from .optimizer_steps import OptimizerSteps


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
            the run. The momentum is ``interval / horizon`` in updates. Defaults to None.
        base_batch_size: Batch size that momentum and gamma are chosen for. In a run with k times
            that batch, all ranks and accumulated iterations counted, they become
            ``1 - (1 - momentum) ** k`` and ``gamma / k``, but for values of restarts. Defaults to
            None: that of ``auto_scale_lr`` where it is enabled, else they stay.
        **averaged_model: Arguments of the averaged model, such as ``momentum``.

    Raises:
        AssertionError: If ``begin_iter`` or ``begin_epoch`` is negative, or both are set.
        TypeError: If an argument is none of the hook's and none of the averaged model's.
        ValueError: If a value is out of range.

    Example:
        >>> custom_hooks = [  # in a config
        ...     dict(type='mmema.EMAHook', momentum=0.0002, also=dict(short=dict(momentum=0.001))),
        ... ]
    """

    def __init__(
        self,
        ema_type: str | type = 'mmema.RestartableExpMomentumEMA',
        strict_load: bool = False,
        begin_iter: int = 0,
        begin_epoch: int = 0,
        per_optimizer_step: bool = True,
        also: dict | None = None,
        horizon: str | float | None = None,
        base_batch_size: int | None = None,
        **averaged_model,
    ):
        super().__init__(ema_type, strict_load, begin_iter, begin_epoch, **averaged_model)
        check_bool('per_optimizer_step', per_optimizer_step)
        if base_batch_size is not None:
            check_integer('base_batch_size', base_batch_size)
        self.per_optimizer_step = per_optimizer_step
        self.base_batch_size = base_batch_size
        main = AverageConfig(ema_type, averaged_model, horizon)
        self.configs = {MAIN: main, **also_configs(also, main)}
        self.src_model: nn.Module | None = None
        self._averages: dict[str, TrackedAverage] = {}
        self._made_for: tuple = ()  # the run and the model
        self._optimizer_steps = OptimizerSteps()
        self._swap: Swap | ShardedSwap | None = None

    # --- the average and its source ---------------------------------------------------------------

    @property
    def ema_model(self) -> BaseAveragedModel | None:
        """The main averaged model; None before the run."""
        return self._averages[MAIN].ema_model if self._averages else None

    @property
    def also(self) -> dict[str, BaseAveragedModel | None]:
        """The other averaged models by name; None before the run."""
        averages = self._averages or dict.fromkeys(self.configs)
        return {name: one and one.ema_model for name, one in averages.items() if name != MAIN}

    def before_run(self, runner: Runner) -> None:
        """Make the averages, unless this run has those of this model already."""
        self._restore()
        ema_hook_of(runner)  # refuses a second one
        base = self.base_batch_size or auto_scale_base(runner)
        in_units = base or any(config.horizon for config in self.configs.values())
        trains = isinstance(runner._train_loop, BaseLoop)
        facts = facts_of(runner, self) if in_units and trains else None
        batch = batch_of_update(runner, facts) if base and facts else None
        source = self.src_model = checked_source(runner)
        if self._made_for != (runner, source):
            self._averages = {n: TrackedAverage(c, source, n) for n, c in self.configs.items()}
            self._made_for = (runner, source)
        if facts is not None:
            for average in self._averages.values():
                average.settle(base, batch, facts)
        choose_checkpoint(runner)
        for loop in (getattr(runner, '_val_loop', None), getattr(runner, '_test_loop', None)):
            guarded = getattr(getattr(loop, 'run', None), 'func', None) == self._run_and_restore
            if isinstance(loop, BaseLoop) and not guarded:
                loop.run = partial(self._run_and_restore, loop.run)

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
        source = self._source(runner)
        for average in self._averages.values():
            average.copy(source)
            begin_part(average.record, runner, self)
        if any(average.config.rule for average in self._averages.values()):
            facts, evaluated = facts_of(runner, self), prefixes_of(runner.val_loop)
            for average in self._averages.values():
                average.begin(facts, evaluated)

    def before_train_epoch(self, runner: Runner) -> None:
        """Catch up on a validation that decides about a plateau, after a resume."""
        for average in self._averages.values():
            average.restarts.catch_up(runner)

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
        with staged_once():
            for average in self._averages.values():
                average.has_own_weights = True
                if stepped:
                    average.update(source, self._ema_started(runner), runner.iter)

    # --- evaluation -------------------------------------------------------------------------------

    def before_val_epoch(self, runner: Runner) -> None:
        """Swap the averaged weights into the model."""
        average = self._averages_of(runner)[0]
        self._restore()
        self._report()
        if average.has_own_weights:
            self._swap = swap_in(self._source(runner), average.ema_model)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Restore the trained weights; decide about restarts of averages of ``also``."""
        self._restore()
        if isinstance(runner._train_loop, BaseLoop):
            results = getattr(runner.val_loop, 'results', {})  # of EMAValLoop
            for name, average in self._averages.items():
                average.restarts.see_validation(runner, results.get(name, {}))

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Restore the trained weights."""
        self._restore()

    before_test_epoch = before_val_epoch

    def _restore(self) -> None:
        swap, self._swap = self._swap, None
        if swap is not None and not swap.undo():
            for average in self._averages.values():
                average.has_own_weights = False
            warn(
                'the layers of the model were changed while it held the averaged weights (as '
                'switch_to_deploy does): it keeps them, and cannot be trained on.'
            )

    def _run_and_restore(self, run, *args, **kwargs):
        try:
            return run(*args, **kwargs)
        finally:  # no hook is called after an exception
            self._restore()

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
        checkpoint['ema_state_dict'] = to_save(self.ema_model.state_dict())
        exchange_weights(checkpoint)
        if self.also:
            checkpoint['ema_also'] = {
                average.name: average.state(to_save) for average in averages[1:]
            }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Resume the averages, or let them be copies of the loaded model."""
        self._restore()
        averages = self._averages_of(runner)
        (file, resumes), strict = what_loads(runner), self.strict_load
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
        for average in averages:
            if average.name in saved:
                average.resume(saved[average.name], unwrapped(runner.model), strict, file)
            else:
                warn(f'{file} has no average {average.name!r}: it begins as a copy of the weights')
                average.load(checkpoint, strict)
        dropped = [name for name in saved if name not in self.configs]
        if dropped:
            warn(f'{file} has averages that the config lacks; they are dropped: {listed(dropped)}')
