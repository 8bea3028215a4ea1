"""MMEngine's EMAHook, with what goes wrong in it mended."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from functools import wraps
from weakref import WeakSet, ref

from mmengine.hooks import EMAHook as StockEMAHook
from mmengine.registry import MODELS
from mmengine.runner.base_loop import BaseLoop
from mmengine.runner.checkpoint import load_state_dict, weights_to_cpu

from ..arguments import flag
from ..averaged import MomentumAveragedModel
from ..checkpoints.resume import check_ema_state
from ..messages import listed, warn
from ..registry import HOOKS
from ..run import what_loads
from ..swap import Swap, copy_weights, non_persistent
from ..update.finite import names_of_non_finite
from ..update.pairs import canonical_name, unwrapped


@HOOKS.register_module()
class EMAHook(StockEMAHook):
    """:class:`mmengine.hooks.EMAHook` that never evaluates, saves or loads the wrong weights.

    What is different from MMEngine 0.10.7:

    - The average is made once in a run: ``test()`` after ``train()`` evaluates the trained one.
    - Until the first update it is a copy of the model, after ``init_weights`` and loading too,
      whatever the loaded file looks like and lacks.
    - A checkpoint is resumed by ``Runner.resume``, and loaded by ``Runner.load_checkpoint``, in a
      resumed run too. To resume, its EMA state must be whole.
    - An update belongs to a step of the optimizer: none while gradients are accumulated, none where
      mixed precision skips the step.
    - During an evaluation the model's tensors point to the average, which stays as it is; see
      :func:`mmema.averaged_weights`. Afterwards, also after an exception, they have the trained
      weights again. If the model was switched to deploy form meanwhile, it stays that way.
    - Validations and checkpoints say which tensors of the average are not finite.

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
        self.per_optimizer_step = flag('per_optimizer_step', per_optimizer_step)
        self.ema_model = None
        self.src_model = None
        self._made_for: tuple = (None, None)  # the run and the model, weakly
        # Whether the average has weights of its own. If not, it is meant to be the model's copy.
        self._differs = False
        self._swap: Swap | None = None
        self._guarded: WeakSet = WeakSet()
        self._optimizers: list = []
        self._handles: list = []
        self._steps_seen = 0
        self._iterations = 0
        self._ever_stepped = False
        self._told_of_no_step = False
        self._not_finite: set = set()

    # --- the average and its source ---------------------------------------------------------------

    def before_run(self, runner) -> None:
        """Make the average, if this run has none yet of this model."""
        self._put_back()
        source = self._source(runner)
        if not self._is_made_for(runner, source):
            super().before_run(runner)
            self.src_model = source
            self._made_for = (ref(runner), ref(source))
            self._differs = False
            self._not_finite = set(names_of_non_finite(self.ema_model.module))  # masks, say
        self._guard_loops(runner)

    def _is_made_for(self, runner, source) -> bool:
        made_for = self._made_for
        return self.ema_model is not None and made_for[0]() is runner and made_for[1]() is source

    def _source(self, runner):
        model = unwrapped(runner.model)
        self.src_model = getattr(model, '_orig_mod', model)  # without torch.compile
        return self.src_model

    def _guard_loops(self, runner) -> None:
        for name in ('_val_loop', '_test_loop'):
            self._guard(getattr(runner, name, None))

    def _guard(self, loop) -> None:
        """Put the trained weights back whichever way an evaluation ends."""
        if not isinstance(loop, BaseLoop) or loop in self._guarded:
            return
        run = loop.run

        @wraps(run)
        def guarded(*args, **kwargs):
            try:
                return run(*args, **kwargs)
            finally:  # no hook is called after an exception
                self._put_back()

        loop.run = guarded
        self._guarded.add(loop)

    # --- updates ----------------------------------------------------------------------------------

    def before_train(self, runner) -> None:
        """Take the first copy; ``init_weights`` has run and the weights are loaded by now."""
        super().before_train(runner)
        if self.ema_model is not None and not self._differs:
            copy_weights(self.ema_model.module, self._source(runner))

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Watch the optimizers, which may have been replaced; see that nothing is mixed up."""
        if self._swap is not None:  # an evaluation that nobody guarded has failed
            self._put_back()
        if not self._differs:  # weights were loaded meanwhile
            copy_weights(self.ema_model.module, self._source(runner))
        if not self.per_optimizer_step:
            return
        optimizers = optimizers_of(runner.optim_wrapper)
        if [*map(id, optimizers)] != [*map(id, self._optimizers)]:
            for handle in self._handles:
                handle.remove()
            self._handles = [o.register_step_post_hook(self._see_step) for o in optimizers]
            self._optimizers = optimizers
        self._steps_seen = 0

    def _see_step(self, optimizer, args, kwargs) -> None:
        # Fused optimizers under GradScaler are called in any case and skip the step themselves.
        found_inf = getattr(optimizer, 'found_inf', None)
        if found_inf is None or not bool(found_inf):
            self._steps_seen += 1

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Update the average, if an optimizer has made a step."""
        self._differs = True
        self._iterations += 1
        if not self._has_stepped(runner):
            return
        self._ever_stepped = True
        if self._ema_started(runner):
            self.ema_model.update_parameters(self._source(runner))
        elif isinstance(self.ema_model, MomentumAveragedModel):
            self.ema_model.steps.zero_()
            self.ema_model.update_parameters(self._source(runner))  # copies, what is finite
            self.ema_model.steps.zero_()
        else:
            copy_weights(self.ema_model.module, self._source(runner))

    def _has_stepped(self, runner) -> bool:
        if not self.per_optimizer_step:
            return True
        if self._optimizers:
            return self._steps_seen > 0
        # An optimizer that is none of torch's has no hooks; what MMEngine means to do must do.
        should_update = getattr(runner.optim_wrapper, 'should_update', None)
        return should_update is None or should_update()

    # --- evaluation -------------------------------------------------------------------------------

    def before_val_epoch(self, runner) -> None:
        """Let the model have the averaged weights."""
        self._put_in(runner)

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        """Let the model have the trained weights again."""
        self._put_back()

    def before_test_epoch(self, runner) -> None:
        """Let the model have the averaged weights."""
        self._put_in(runner)

    def after_test_epoch(self, runner, metrics: dict | None = None) -> None:
        """Let the model have the trained weights again."""
        self._put_back()

    def _put_in(self, runner) -> None:
        if self.ema_model is None:  # a loop that was run by hand
            self.before_run(runner)
        self._put_back()
        self._guard_loops(runner)
        self._tell()
        if self._differs:
            self._swap = Swap(self._source(runner), self.ema_model)

    def _put_back(self) -> None:
        swap, self._swap = self._swap, None
        if swap is not None and not swap.undo():
            self._differs = False
            warn(
                'the layers of the model were changed while it held the averaged weights (as '
                'switch_to_deploy does): it keeps them, and cannot be trained on.'
            )

    def _tell(self) -> None:
        """Say what is wrong with the average, before it is evaluated or saved."""
        if self._iterations and not self._ever_stepped and not self._told_of_no_step:
            self._told_of_no_step = True
            warn(
                f'the average has not moved: no optimizer told of a step in {self._iterations} '
                'iterations. per_optimizer_step=False updates it at each of them.'
            )
        if hasattr(self.ema_model, 'log_skipped'):
            self.ema_model.log_skipped()
        names = names_of_non_finite(self.ema_model.module)
        new = [name for name in names if name not in self._not_finite]
        self._not_finite = set(names)
        if new:
            warn(
                f'not finite in the average: {listed(new)} (after {int(self.ema_model.steps)} '
                'updates). They stay so until a hard restart; skip_non_finite=True keeps such '
                'values out.'
            )

    # --- checkpoints ------------------------------------------------------------------------------

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Save the averaged weights as ``state_dict``, the trained ones in ``ema_state_dict``."""
        if self.ema_model is None:
            self.before_run(runner)
        self._tell()
        if not self._differs:
            try:
                copy_weights(self.ema_model.module, self._source(runner))
            except ValueError as error:
                warn(f'the checkpoint is saved without an EMA state: {error}')
                return
        if self._swap is not None:
            checkpoint['state_dict'] = weights_to_cpu(self._swap.trained_state())
        checkpoint['ema_state_dict'] = weights_to_cpu(self.ema_model.state_dict())
        exchange(checkpoint)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Resume the average, or let it be a copy of the loaded model."""
        if self.ema_model is None:  # loaded by hand, before train(), val() or test()
            self.before_run(runner)
        self._put_back()
        file, resumes = what_loads(runner)
        if resumes and 'ema_state_dict' in checkpoint:
            check_ema_state(checkpoint, self.ema_model, file)
            exchange(checkpoint)
            self.ema_model.load_state_dict(checkpoint['ema_state_dict'], strict=self.strict_load)
            average = self.ema_model.module
            copy_weights(average, self._source(runner), only=non_persistent(average))
            self._differs = True
            return
        if resumes:
            warn(f'{file} has no ema_state_dict: the average begins as a copy of its weights.')
        average, weights = self.ema_model.module, weights_of(checkpoint)
        load_state_dict(average, weights, strict=self.strict_load, logger='current')
        self._differs = False


def refuse_unknown_arguments(ema_type, arguments: dict) -> None:
    """Raise TypeError for arguments that the averaged model does not have, if it is known yet."""
    cls = ema_type
    if not isinstance(ema_type, type):
        with MODELS.switch_scope_and_registry(None) as registry:
            cls = registry.get(ema_type)
    if cls is None:
        return  # imported later; building it will tell
    known = inspect.signature(cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    names = [name for name in known if name != 'model']
    wrong = [name for name in arguments if name not in names]
    if wrong:
        raise TypeError(
            f'EMAHook passes on what {cls.__name__} takes ({", ".join(names)}), got {listed(wrong)}'
        )


def optimizers_of(wrapper) -> list:
    """Return the optimizers of an OptimWrapper or OptimWrapperDict, if they tell of their steps."""
    wrappers = wrapper.values() if hasattr(wrapper, 'optim_wrappers') else [wrapper]
    optimizers = [getattr(wrapper, 'optimizer', None) for wrapper in wrappers]
    telling = all(hasattr(optimizer, 'register_step_post_hook') for optimizer in optimizers)
    return optimizers if telling else []


def weights_of(checkpoint: dict) -> OrderedDict:
    """Return the weights in a checkpoint, or in a bare state dict, by their plain names."""
    weights = checkpoint.get('state_dict', checkpoint)
    named = OrderedDict(
        (key[7:] if key.startswith('module.') else key, weights[key]) for key in weights
    )
    named._metadata = getattr(weights, '_metadata', OrderedDict())
    return named


def exchange(checkpoint: dict) -> None:
    """Exchange the weights under ``state_dict`` and ``ema_state_dict``, in place."""
    model, average = checkpoint['state_dict'], checkpoint['ema_state_dict']
    keys = {canonical_name(key): key for key in model}
    followed = {key: canonical_name(key[7:]) for key in average if key.startswith('module.')}
    missing = [name for name in followed.values() if name not in keys]
    if missing:
        raise ValueError(
            f'state_dict must hold what ema_state_dict holds, but lacks {listed(missing)}'
        )
    for key, name in followed.items():
        model[keys[name]], average[key] = average[key], model[keys[name]]
