"""Hook that logs the state of the average beside the losses."""

from __future__ import annotations

import torch
from mmengine.hooks import Hook, LoggerHook
from mmengine.model import BaseAveragedModel
from mmengine.runner import Runner
from torch import nn

from ..arguments import check_integer
from ..registry import HOOKS, register_everywhere
from ..run import averages_of, ema_hook_of
from ..update.finite import is_number
from ..update.pairs import pairs_of
from ..update.sharded import Parts, followed


@register_everywhere(HOOKS)
class EMAMonitorHook(Hook):
    """Log the state of the average, in the text log and in every visualization backend.

    The scalars, under ``train/``, are those of the next update:

    - ``ema_momentum``: the weight of the new value;
    - ``ema_horizon``: ``interval / momentum`` of the average, rounded: about how many recent
      updates it remembers;
    - ``ema_steps``: updates since the last restart;
    - ``ema_restarts``: how many restarts there have been;
    - ``ema_distance``: ``||average - source|| / ||source||`` over all parameters.

    Those of the averages in ``also`` have their names: ``ema_short_momentum``. What an averaged
    model does not have is left out. The scalars are measured at the iterations at
    which LoggerHook writes; at all others the hook costs nothing.

    Args:
        interval: Iterations between two measurements. Defaults to None: those of LoggerHook, and
            10 where the run has none.

    Raises:
        TypeError: If ``interval`` is no integer.
        ValueError: If ``interval`` is below 1, or the run has no EMAHook.

    Example:
        >>> custom_hooks = [  # in a config
        ...     dict(type='EMAHook', ema_type='mmema.RestartableExpMomentumEMA'),
        ...     dict(type='mmema.EMAMonitorHook'),
        ... ]
    """

    priority = 55  # after EMAHook (NORMAL, 50) has updated, before LoggerHook (60) writes

    def __init__(self, interval: int | None = None):
        if interval is not None:
            check_integer('interval', interval)
        self.interval = interval

    def before_train(self, runner: Runner) -> None:
        """Find the EMAHook and the LoggerHook of the run."""
        self._ema_hook = ema_hook_of(runner)
        loggers = [hook for hook in runner.hooks if isinstance(hook, LoggerHook)] or [LoggerHook()]
        self._interval = self.interval or loggers[0].interval
        self._ignore_last = loggers[0].ignore_last

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        """Measure, if LoggerHook is about to write."""
        if not self.every_n_inner_iters(batch_idx, self._interval):
            # LoggerHook also writes at the end of an epoch that is shorter than its interval.
            writes = len(runner.train_dataloader) <= self._interval or not self._ignore_last
            last = self.end_of_epoch(runner.train_dataloader, batch_idx)
            if self.interval is not None or not (last and writes):
                return
        for name, average in averages_of(self._ema_hook).items():
            prefix = f'train/ema_{name}_' if name else 'train/ema_'
            distance = relative_distance(average.module, runner.model)
            for key, value in {**state_of(average), 'distance': distance}.items():
                runner.message_hub.update_scalar(f'{prefix}{key}', value)


def state_of(ema_model: BaseAveragedModel) -> dict:
    """Return momentum, horizon, steps and restarts of an averaged model, as far as it has them."""
    state = {}
    momentum = getattr(ema_model, 'current_momentum', None)
    if momentum is not None:
        # Only every interval-th update blends.
        state.update(momentum=momentum, horizon=round(ema_model.interval / momentum))
    state['steps'] = int(ema_model.steps)
    if hasattr(ema_model, 'restarts'):
        state['restarts'] = ema_model.restarts
    return state


@torch.no_grad()
def relative_distance(average: nn.Module, source: nn.Module) -> float:
    """Return ``||average - source|| / ||source||`` over the parameters, each tensor once."""
    norms, source = [], followed(source)
    for pair, is_buffer in pairs_of(average, source):
        if not is_buffer and is_number(pair.source):
            own = pair.source.to(pair.average.dtype)
            norms.append(torch.stack([(pair.average.to(own.device) - own).norm(), own.norm()]))
    if not norms:
        return 0.0
    norms = torch.stack([both.to(norms[0].device) for both in norms]).norm(dim=0)
    if isinstance(source, Parts):
        norms = source.reduced(norms.square(), 'SUM').sqrt()
    apart, size = norms
    return float(apart / size)
