"""Validation loop that evaluates the raw weights and all averages."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Sequence

from mmengine.hooks import EMAHook as StockEMAHook
from mmengine.hooks import RuntimeInfoHook
from mmengine.runner import IterBasedTrainLoop, Runner, ValLoop
from mmengine.runner.base_loop import BaseLoop

from .averages.evaluation import evaluate, evaluate_quietly
from .averages.scores import Scores, logged_scores
from .hooks.ema import EMAHook
from .hooks.recalibrate import EMARecalibrateHook
from .messages import RunError, warn
from .registry import LOOPS, register_everywhere
from .run import MAIN, averages_of, ema_hook_of, folders_of, last_of, now_of, watched_metric
from .run.metrics import prefixes_of
from .swap import averaged_weights


@register_everywhere(LOOPS)
class EMAValLoop(ValLoop):
    """:class:`mmengine.runner.ValLoop` that evaluates all weights of a run.

    The metrics of the main average keep their names and stand first, so ``save_best``, early
    stopping and schedulers see no change; those of the raw weights and of the averages in ``also``
    follow, with the name of the weights as a prefix: ``save_best='short/coco/bbox_mAP'`` works. The
    others are evaluated first, without any hook: pictures are drawn and progress is logged only for
    the main average. Training goes on exactly as with MMEngine's loop, random numbers included.

    The last validation logs a table of the best and the last score of all weights; a warning tells
    when the main average has been worse than the raw weights three times in a row. They are of the
    first metric of ``save_best``, or the first one that is measured. Where neither a ``rule`` nor
    MMEngine knows whether more of it is better, the table has the last score alone.

    Where the main average gives no metric at all, as CocoMetric does without a single detection,
    the other metrics go to the log only: hooks still find nothing and skip that validation.

    If a validation fails or is interrupted, the raw weights are put back into the model.

    Args:
        runner, dataloader, evaluator, fp16: As of MMEngine's loop.
        prefix: Prefix of the raw metrics' names, before a slash. Defaults to 'raw'.
        weights: Weights to evaluate beside the main average: 'raw', names in ``also`` and rungs of
            a ladder. Defaults to None, all but the rungs, which ``horizon='auto'`` evaluates.

    Raises:
        TypeError: If ``prefix`` is no string.
        ValueError: If ``prefix`` is empty or the name of an average, the run has no EMAHook, or
            ``weights`` has another name.

    Example:
        >>> val_cfg = dict(type='mmema.EMAValLoop')  # in a config: coco/bbox_mAP, raw/coco/bbox_mAP
    """

    def __init__(
        self,
        runner: Runner,
        dataloader,
        evaluator,
        fp16: bool = False,
        prefix: str = 'raw',
        weights: Sequence[str] | None = None,
    ):
        try:
            ema_hook = ema_hook_of(runner)
            others = [name for name in averages_of(ema_hook) if name != MAIN]
        except RunError as error:
            raise RunError(f'EMAValLoop evaluates several weights: {error}') from None
        if not isinstance(prefix, str):
            raise TypeError(f'prefix must be a string, got {prefix!r}')
        if not prefix.strip('/') or prefix.strip('/') in others:
            raise ValueError(f'prefix must not be empty or the name of an average, got {prefix!r}')
        known = ['raw', *others]
        wrong = [name for name in weights or () if name not in known]
        if wrong or isinstance(weights, str):
            raise ValueError(f'weights must be a list of names out of {known}, got {weights!r}')
        super().__init__(runner, dataloader, evaluator, fp16)
        self.prefix = prefix.strip('/')
        rungs = getattr(ema_hook, 'rungs', {})  # of a ladder, which evaluates them itself
        default = [name for name in known if name not in rungs]
        self.weights = default if weights is None else list(weights)
        self.results: dict[str, dict] = {}  # metrics of the last validation by name of the weights
        # A checkpoint is saved before the validation of its epoch, so it lacks those scores.
        self._lacks_scores = bool(runner._resume)

    def run(self) -> dict:
        """Evaluate all weights; return the metrics of the main average, then of the others."""
        runner, self.results = self.runner, {}
        if not isinstance(runner._train_loop, BaseLoop):
            # Without training all of them are the loaded weights, and one evaluation is enough.
            return self._evaluate_main({})
        averages, others = averages_of(ema_hook_of(runner)), {}
        for name, prefix in prefixes_of(self).items():
            runner.logger.info(f'Evaluating the {name} weights ...')
            swap = nullcontext()
            if name != 'raw':
                swap = averaged_weights(runner.model, averages[name])
            with swap:
                self.results[name] = evaluate_quietly(self)
            others.update({f'{prefix}{key}': v for key, v in self.results[name].items()})
        runner.logger.info('Evaluating the EMA weights ...')
        metrics = self._evaluate_main(others)
        self._compare({key: value for key, value in metrics.items() if key not in others})
        return metrics

    def _evaluate_main(self, others: dict) -> dict:
        """Evaluate the main average with the run's hooks, which receive the other metrics, too."""
        runner, swapped = self.runner, False

        def call_hook(name, **kwargs):
            nonlocal swapped
            if name == 'after_val_epoch':
                if not getattr(ema_hook_of(runner), 'rungs', {}):  # a ladder adds such names itself
                    refuse_same_names(kwargs['metrics'], others)
                swapped = False
                if kwargs['metrics']:
                    kwargs['metrics'].update(others)
                else:
                    RuntimeInfoHook().after_val_epoch(runner, others)  # to the log only
            runner.call_hook(name, **kwargs)
            if name == 'before_val_epoch':
                swapped = True

        try:
            return evaluate(self, call_hook)
        finally:
            if swapped and not isinstance(ema_hook_of(runner), EMAHook):
                for hook in runner.hooks:  # MMEngine's hook leaves the average in the model
                    if isinstance(hook, (StockEMAHook, EMARecalibrateHook)):
                        hook.after_val_epoch(runner, metrics={})

    def _compare(self, main: dict) -> None:
        """Keep the scores of a validation in the checkpoints; log what they tell."""
        runner, loop = self.runner, self.runner.train_loop
        if not main:
            return
        prefixes = prefixes_of(self)
        watched = watched_metric(runner.hooks, list(main), prefixes.values())
        saved = runner.message_hub.runtime_info.get('ema_scores', {})
        saved = {'': saved} if MAIN in saved else saved  # mmema 0.1.0 did not name the metric
        scores, now = Scores(watched, [MAIN, *prefixes]), now_of(runner)
        if self._lacks_scores:
            self._lacks_scores = False
            names = {name: f'{prefix}{watched.metric}' for name, prefix in prefixes.items()}
            times = [at for points in saved.values() for at, _ in points.get(MAIN, [])]
            for folder in reversed(folders_of(runner)):
                scores.add(logged_scores(folder, {MAIN: watched.metric, **names}, times))
        scores.add(saved.get(watched.metric, {}))
        for name, metrics in {MAIN: main, **self.results}.items():
            if watched.metric in metrics:
                scores.add({name: [(now, float(metrics[watched.metric]))]})
        runner.message_hub.update_info('ema_scores', {watched.metric: scores.points})
        line = scores.raw_ahead()
        if line:
            warn(line)
        if now == last_of(loop) or getattr(loop, 'stop_training', False):
            unit = 'iter' if isinstance(loop, IterBasedTrainLoop) else 'epoch'
            runner.logger.info(scores.table(unit))


def refuse_same_names(main: dict, others: dict) -> None:
    """Raise RunError if a metric of the main average is called as one of other weights."""
    for name in main:
        if name in others:
            raise RunError(
                f'the metric {name!r} of the main average and {name.partition("/")[2]!r} of '
                f'{name.partition("/")[0]!r} have one name. Give that average another name in also.'
            )
