"""Validation loop that evaluates the raw weights and all averages."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Sequence

from mmengine.hooks import EMAHook as StockEMAHook
from mmengine.hooks import RuntimeInfoHook
from mmengine.runner import IterBasedTrainLoop, Runner, ValLoop
from mmengine.runner.base_loop import BaseLoop

from .hooks.ema import EMAHook
from .hooks.recalibrate import EMARecalibrateHook
from .messages import RunError, warn
from .registry import LOOPS, register_everywhere
from .run import averages_of, ema_hook_of, kept_rng, last_of, now_of, watched_metric
from .run.metrics import prefixes_of
from .swap import averaged_weights

AHEAD = 3  # validations in a row after which the log says that the raw weights are ahead


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
        weights: Weights to evaluate beside the main average: 'raw' and names in ``also``. Defaults
            to None, all.

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
            others = [name for name in averages_of(ema_hook_of(runner)) if name]
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
        self.weights = known if weights is None else list(weights)
        self.results: dict[str, dict] = {}  # metrics of the last validation by name of the weights

    def run(self) -> dict:
        """Evaluate all weights; return the metrics of the main average, then of the others."""
        if not isinstance(self.runner._train_loop, BaseLoop):
            # Without training all of them are the loaded weights, and one evaluation is enough.
            return self._evaluate({})
        averages, self.results, others = averages_of(ema_hook_of(self.runner)), {}, {}
        for name in self.weights:
            self.runner.logger.info(f'Evaluating the {name} weights ...')
            swap = nullcontext()
            if name != 'raw':
                swap = averaged_weights(self.runner.model, averages[name])
            with kept_rng(), swap:  # an iterator over a dataloader draws a number
                self.results[name] = self._evaluate()
            prefix = self.prefix if name == 'raw' else name
            others.update({f'{prefix}/{key}': v for key, v in self.results[name].items()})
        self.runner.logger.info('Evaluating the EMA weights ...')
        metrics = self._evaluate(others)
        self._compare({key: value for key, value in metrics.items() if key not in others})
        return metrics

    def _evaluate(self, others: dict | None = None) -> dict:
        """Evaluate with hooks, which receive the metrics ``others`` too; with None without any."""
        runner, call_hook, swapped = self.runner, self.runner.call_hook, False

        def call(name, **kwargs):
            nonlocal swapped
            if others is None:
                return
            if name == 'after_val_epoch':
                swapped = False
                if kwargs['metrics']:
                    kwargs['metrics'].update(others)
                else:
                    RuntimeInfoHook().after_val_epoch(runner, others)  # to the log only
            call_hook(name, **kwargs)
            if name == 'before_val_epoch':
                swapped = True

        runner.call_hook = call
        try:
            return super().run()
        finally:
            runner.call_hook = call_hook
            if swapped and not isinstance(ema_hook_of(runner), EMAHook):
                for hook in runner.hooks:  # MMEngine's hook leaves the average in the model
                    if isinstance(hook, (StockEMAHook, EMARecalibrateHook)):
                        hook.after_val_epoch(runner, metrics={})
            for metric in self.evaluator.metrics:
                metric.results.clear()  # those of a validation that failed halfway

    def _compare(self, main: dict) -> None:
        """Keep the scores of a validation in the checkpoints; log what they tell."""
        runner, loop = self.runner, self.runner.train_loop
        if not main:
            return
        metric, less = watched_metric(runner.hooks, list(main), prefixes_of(self).values())
        now, scores = now_of(runner), runner.message_hub.runtime_info.get('ema_scores', {})
        for name, metrics in {'ema': main, **self.results}.items():
            if metric in metrics:
                scores.setdefault(name, []).append((now, float(metrics[metric])))
        runner.message_hub.update_info('ema_scores', scores)
        line = '' if less is None else _raw_ahead(scores, metric, less)
        if line:
            warn(line)
        if now == last_of(loop) or getattr(loop, 'stop_training', False):
            unit = 'iter' if isinstance(loop, IterBasedTrainLoop) else 'epoch'
            runner.logger.info(_table(scores, metric, less, unit))


def _raw_ahead(scores: dict, metric: str, less: bool) -> str:
    """Return a line if the raw weights have been better for three validations by now, else ''."""
    raw_at = dict(scores.get('raw', []))
    pairs = [(ema, raw_at[at]) for at, ema in scores['ema'] if at in raw_at][-AHEAD - 1 :]
    ahead = [raw < ema if less else raw > ema for ema, raw in pairs]
    said_before = len(ahead) > AHEAD and ahead[0]
    if len(ahead) < AHEAD or not all(ahead[-AHEAD:]) or said_before:
        return ''
    numbers = ', '.join(f'{ema:.4g} against {raw:.4g}' for ema, raw in pairs[-AHEAD:])
    return (
        f'the average has been worse than the raw weights for {AHEAD} validations in a row, '
        f'{metric}: {numbers}. Its horizon may be too long for this stage: try a larger momentum '
        'or smaller gamma, a restart where the data changes (mmema.EMARestartHook), or several '
        'averages at once (also= of mmema.EMAHook).'
    )


def _table(scores: dict, metric: str, less: bool | None, unit: str) -> str:
    """Return the best and the last score of all weights as lines of text."""
    rows = [('weights', 'best', unit, 'last')]
    for name, points in scores.items():
        at, best = (min if less else max)(points, key=lambda point: point[1])
        rows.append((name, f'{best:.4f}', str(at), f'{points[-1][1]:.4f}'))
    if less is None:  # what would be the best is not known
        rows = [(row[0], row[-1]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    return '\n'.join([f'{metric} of all weights', *(line.rstrip() for line in lines)])
