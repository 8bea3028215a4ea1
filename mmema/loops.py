"""Validation loop that evaluates both the raw and the EMA weights."""

from __future__ import annotations

import numpy as np
from mmengine.hooks import EMAHook as StockEMAHook
from mmengine.runner import Runner, ValLoop
from mmengine.runner.base_loop import BaseLoop

from .hooks.recalibrate import EMARecalibrateHook
from .messages import RunError
from .registry import LOOPS, register_everywhere
from .run import ema_hook_of, kept_rng


@register_everywhere(LOOPS)
class EMAValLoop(ValLoop):
    """:class:`mmengine.runner.ValLoop` that evaluates the raw weights beside the EMA weights.

    The metrics of the EMA weights keep their names and stand first, so ``save_best``, early
    stopping and schedulers see no change; those of the raw weights follow with a prefix. The raw
    weights are evaluated first, without any hook: pictures are drawn and progress is logged only
    for the EMA weights. Training goes on exactly as with MMEngine's loop, random numbers included.

    Where the EMA weights give no metric at all, as CocoMetric does without a single detection, the
    raw ones go to the log only: hooks still find nothing and skip that validation.

    If a validation fails or is interrupted, the raw weights are put back into the model.

    Args:
        runner: The runner.
        dataloader: The validation dataloader or its config.
        evaluator: The evaluator or its config.
        fp16: Whether to evaluate in half precision. Defaults to False.
        prefix: Prefix of the raw metrics' names, before a slash. Defaults to 'raw'.

    Raises:
        TypeError: If ``prefix`` is no string.
        ValueError: If ``prefix`` is empty, or the run has no EMAHook.

    Example:
        >>> val_cfg = dict(type='mmema.EMAValLoop')  # in a config: coco/bbox_mAP, raw/coco/bbox_mAP
    """

    def __init__(
        self, runner: Runner, dataloader, evaluator, fp16: bool = False, prefix: str = 'raw'
    ):
        if not isinstance(prefix, str):
            raise TypeError(f'prefix must be a string, got {prefix!r}')
        if not prefix.strip('/'):
            raise ValueError(f'prefix must not be empty, got {prefix!r}')
        try:
            ema_hook_of(runner)
        except RunError as error:
            raise RunError(f'EMAValLoop evaluates two weights: {error}') from None
        super().__init__(runner, dataloader, evaluator, fp16)
        self.prefix = prefix.strip('/')

    def run(self) -> dict:
        """Evaluate the raw weights, then the EMA weights.

        Returns:
            The metrics of the EMA weights, followed by those of the raw weights.
        """
        # Without training both are the loaded weights, and one evaluation is enough.
        training = isinstance(self.runner._train_loop, BaseLoop)
        return self._run_with(_EMARunner(self.runner, self._run_raw() if training else {}))

    def _run_raw(self) -> dict:
        self.runner.logger.info('Evaluating the raw weights ...')
        with kept_rng():  # an iterator over a dataloader draws a number
            metrics = self._run_with(_RawRunner(self.runner))
        self.runner.logger.info('Evaluating the EMA weights ...')
        return {f'{self.prefix}/{name}': value for name, value in metrics.items()}

    def _run_with(self, runner: _RawRunner) -> dict:
        own, self._runner = self._runner, runner
        try:
            return super().run()
        except BaseException:
            runner.restore_weights()
            raise
        finally:
            self._runner = own
            for metric in self.evaluator.metrics:
                metric.results.clear()  # those of a validation that failed halfway


class _RawRunner:
    """The runner without its hooks, for the evaluation of the raw weights."""

    def __init__(self, runner: Runner):
        self.runner = runner

    def __getattr__(self, name):
        return getattr(self.runner, name)

    def call_hook(self, name, **kwargs):
        pass

    def restore_weights(self):
        pass


class _EMARunner(_RawRunner):
    """The runner with its hooks, which receive the raw metrics beside those of the EMA weights."""

    def __init__(self, runner: Runner, raw: dict):
        super().__init__(runner)
        self.raw = raw
        self.swapped = False

    def call_hook(self, name, **kwargs):
        if name == 'after_val_epoch':
            self.swapped = False
            self._add_raw(kwargs['metrics'])
        self.runner.call_hook(name, **kwargs)
        if name == 'before_val_epoch':
            self.swapped = True

    def _add_raw(self, metrics):
        if metrics:
            metrics.update(self.raw)
            return
        for name, value in self.raw.items():
            if isinstance(value, (int, float, np.number)):
                self.runner.message_hub.update_scalar(f'val/{name}', value)

    def restore_weights(self):
        if not self.swapped:
            return
        for hook in self.runner.hooks:
            if isinstance(hook, (StockEMAHook, EMARecalibrateHook)):
                hook.after_val_epoch(self.runner, metrics={})
