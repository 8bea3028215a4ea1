"""MMEngine's EMAHook, mended where it evaluates, saves or loads the wrong weights."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from functools import wraps
from weakref import WeakSet, ref

from mmengine.hooks import EMAHook as StockEMAHook
from mmengine.model import BaseAveragedModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop
from mmengine.runner.checkpoint import weights_to_cpu
from torch import nn

from ..arguments import check_bool
from ..checkpoints.resume import check_ema_state, choose_checkpoint
from ..messages import RunError, listed, warn
from ..registry import HOOKS
from ..run import what_loads
from ..swap import Swap
from ..update.pairs import canonical_name, unwrapped
from ..update.refusals import refuse_sharded
from .optimizer_steps import OptimizerSteps
from .run_average import RunAverage


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
    - ``FlexibleRunner`` trains, saves and resumes as ``Runner`` does, with ``SingleDeviceStrategy``
      and ``DDPStrategy``. Sharded models are refused.

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
        **averaged_model: Arguments of the averaged model, such as ``momentum``.

    Raises:
        AssertionError: If ``begin_iter`` or ``begin_epoch`` is negative, or both are set.
        TypeError: If an argument is none of the hook's and none of the averaged model's.

    Example:
        >>> custom_hooks = [dict(type='mmema.EMAHook', momentum=0.0002)]  # in a config
    """

    def __init__(
        self,
        ema_type: str | type = 'mmema.RestartableExpMomentumEMA',
        strict_load: bool = False,
        begin_iter: int = 0,
        begin_epoch: int = 0,
        per_optimizer_step: bool = True,
        **averaged_model,
    ):
        super().__init__(ema_type, strict_load, begin_iter, begin_epoch, **averaged_model)
        refuse_unknown_arguments(ema_type, averaged_model)
        check_bool('per_optimizer_step', per_optimizer_step)
        self.per_optimizer_step = per_optimizer_step
        self.src_model: nn.Module | None = None
        self._average: RunAverage | None = None
        self._made_for: tuple = (None, None)  # weak references to the run and the model
        self._optimizer_steps = OptimizerSteps()
        self._swap: Swap | None = None
        self._guarded_loops: WeakSet = WeakSet()
        self._evaluating = False

    # --- the average and its source ---------------------------------------------------------------

    @property
    def ema_model(self) -> BaseAveragedModel | None:
        """The averaged model; None before the run."""
        return self._average and self._average.ema_model

    def before_run(self, runner: Runner) -> None:
        """Make the average, unless this run has one of this model already."""
        self._restore()
        choose_checkpoint(runner)
        source = self._source(runner)
        if self._average is None or [made() for made in self._made_for] != [runner, source]:
            refuse_sharded(runner.model)
            ema_model = MODELS.build(self.ema_cfg, default_args=dict(model=source))
            self._average = RunAverage(ema_model)
            self._made_for = ref(runner), ref(source)
        self._guard_loops(runner)

    def _average_of(self, runner: Runner) -> RunAverage:
        """Return the average; make it if a loop, a load or a save came before the run."""
        if self._average is None:
            self.before_run(runner)
        return self._average

    def _source(self, runner: Runner) -> nn.Module:
        model = unwrapped(runner.model)
        self.src_model = getattr(model, '_orig_mod', model)  # without torch.compile
        return self.src_model

    # --- updates ----------------------------------------------------------------------------------

    def before_train(self, runner: Runner) -> None:
        """Copy the model; ``init_weights`` has run and the weights are loaded by now."""
        super().before_train(runner)
        refuse_unsaved(runner)
        if self._average is not None:
            self._average.copy(self._source(runner))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Copy weights that were loaded meanwhile; begin to count the optimizer's steps."""
        self._evaluating = False
        self._restore()  # if an evaluation without a guard has failed
        self._average.copy(self._source(runner))
        if self.per_optimizer_step:
            self._optimizer_steps.begin_iteration(runner.optim_wrapper)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        """Update the average, if an optimizer has made a step."""
        self._average.has_own_weights = True
        steps = self._optimizer_steps
        if not self.per_optimizer_step or steps.end_iteration(runner.optim_wrapper):
            self._average.update(self._source(runner), begun=self._ema_started(runner))

    # --- evaluation -------------------------------------------------------------------------------

    def before_val_epoch(self, runner: Runner) -> None:
        """Swap the averaged weights into the model."""
        average = self._average_of(runner)
        self._evaluating = True
        self._restore()
        self._guard_loops(runner)
        self._report()
        if average.has_own_weights:
            self._swap = Swap(self._source(runner), average.ema_model)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Restore the trained weights."""
        self._restore()

    def after_val(self, runner: Runner) -> None:
        """Note the end of the evaluation; its best checkpoint is saved by now."""
        self._evaluating = False

    before_test_epoch, after_test_epoch, after_test = before_val_epoch, after_val_epoch, after_val

    def _restore(self) -> None:
        swap, self._swap = self._swap, None
        if swap is not None and not swap.undo():
            self._average.has_own_weights = False
            warn(
                'the layers of the model were changed while it held the averaged weights (as '
                'switch_to_deploy does): it keeps them, and cannot be trained on.'
            )

    def _guard_loops(self, runner: Runner) -> None:
        """Make both loops restore the trained weights after an exception, too."""
        for loop in (getattr(runner, '_val_loop', None), getattr(runner, '_test_loop', None)):
            if isinstance(loop, BaseLoop) and loop not in self._guarded_loops:
                loop.run = self._guarded(loop.run)
                self._guarded_loops.add(loop)

    def _guarded(self, run):
        @wraps(run)
        def run_and_restore(*args, **kwargs):
            try:
                return run(*args, **kwargs)
            finally:  # no hook is called after an exception
                self._restore()

        return run_and_restore

    def _report(self) -> None:
        self._optimizer_steps.report()
        self._average.report()

    # --- checkpoints ------------------------------------------------------------------------------

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Save the averaged weights as ``state_dict``, the trained ones in ``ema_state_dict``."""
        average = self._average_of(runner)
        self._report()
        if hasattr(runner, 'strategy'):
            mend_flexible_checkpoint(runner, checkpoint, self._evaluating)
        try:
            average.copy(self._source(runner))
        except ValueError as error:
            warn(f'the checkpoint is saved without an EMA state: {error}')
            return
        if self._swap is not None:
            checkpoint['state_dict'] = weights_to_cpu(self._swap.trained_state())
        checkpoint['ema_state_dict'] = weights_to_cpu(average.ema_model.state_dict())
        exchange_weights(checkpoint)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Resume the average, or let it be a copy of the loaded model."""
        average = self._average_of(runner)
        self._restore()
        file, resumes = what_loads(runner)
        if resumes and 'ema_state_dict' in checkpoint:
            check_ema_state(checkpoint, average.ema_model, file)
            exchange_weights(checkpoint)
            average.resume(checkpoint['ema_state_dict'], self._source(runner), self.strict_load)
            return
        if resumes:
            warn(
                'There is no `ema_state_dict` in checkpoint. `EMAHook` will make a copy of '
                f'`state_dict` as the initial `ema_state_dict` ({file})'
            )
        average.load(model_weights(checkpoint), self.strict_load)


def refuse_unknown_arguments(ema_type: str | type, arguments: dict) -> None:
    """Raise TypeError for arguments that the averaged model does not have, if it is known yet."""
    cls = ema_type
    if not isinstance(ema_type, type):
        with MODELS.switch_scope_and_registry(None) as registry:
            cls = registry.get(ema_type)
    if cls is None:
        return  # imported later; building it fails then
    known = inspect.signature(cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    names = [name for name in known if name != 'model']
    wrong = [name for name in arguments if name not in names]
    if wrong:
        raise TypeError(
            f'EMAHook passes its other arguments to {cls.__name__}, which takes '
            f'({", ".join(names)}), got {listed(wrong)}'
        )


def refuse_unsaved(runner: Runner) -> None:
    """Raise RunError if checkpoints of the run cannot hold the average.

    Two strategies of FlexibleRunner save and load without calling hooks.
    """
    strategies = [cls.__name__ for cls in type(getattr(runner, 'strategy', None)).__mro__]
    for name in ('DeepSpeedStrategy', 'ColossalAIStrategy'):
        if name in strategies:
            raise RunError(
                f'an average must be saved to be resumed, but the checkpoints of {name} cannot '
                "hold it. Train with strategy=dict(type='DDPStrategy'), or without EMAHook."
            )


def mend_flexible_checkpoint(runner: Runner, checkpoint: dict, evaluating: bool) -> None:
    """Make a checkpoint of FlexibleRunner what Runner saves.

    MMEngine 0.10.7 leaves the prefix of the DDP wrapper in the names, and counts the epoch or the
    iteration that is over once more where a validation saves: a resumed run would skip one.
    """
    if runner.model is not unwrapped(runner.model):
        checkpoint['state_dict'] = model_weights(checkpoint)
    if evaluating:
        checkpoint['meta'].update(epoch=runner.epoch, iter=runner.iter)


def model_weights(checkpoint: dict) -> OrderedDict:
    """Return the weights in a checkpoint, or in a bare state dict, without a wrapper's prefix."""
    weights = checkpoint.get('state_dict', checkpoint)
    named = OrderedDict(
        (key[7:] if key.startswith('module.') else key, weights[key]) for key in weights
    )
    named._metadata = getattr(weights, '_metadata', OrderedDict())
    return named


def exchange_weights(checkpoint: dict) -> None:
    """Exchange the weights under ``state_dict`` and ``ema_state_dict``, in place."""
    model, average = checkpoint['state_dict'], checkpoint['ema_state_dict']
    keys = {canonical_name(key): key for key in model}
    names = {key: canonical_name(key[7:]) for key in average if key.startswith('module.')}
    missing = [name for name in names.values() if name not in keys]
    if missing:
        raise RunError(
            f'state_dict must hold the tensors of ema_state_dict, but lacks {listed(missing)}'
        )
    for key, name in names.items():
        model[keys[name]], average[key] = average[key], model[keys[name]]
