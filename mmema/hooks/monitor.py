"""Hook that logs the state of the average beside the losses."""

from __future__ import annotations

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import Hook, LoggerHook
from mmengine.model import BaseAveragedModel
from mmengine.runner import Runner
from torch import nn

from ..arguments import check_integer
from ..messages import RunError, listed, warn
from ..registry import HOOKS, register_everywhere
from ..run import MAIN, averages_of, ema_hook_of, scalars_of
from ..update.finite import is_number
from ..update.pairs import pairs_of
from ..update.replicas import names_that_differ
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
        check_ranks: Iterations between two comparisons of all ranks, by a checksum of each tensor
            of the averages and of the source: the run stops if parameters, counters or live values
            differ, and a warning names buffers that do. Defaults to None, no comparison.

    Raises:
        TypeError: If an argument is no integer.
        ValueError: If an argument is below 1, the run has no EMAHook, or ranks differ.

    Example:
        >>> custom_hooks = [  # in a config
        ...     dict(type='EMAHook', ema_type='mmema.RestartableExpMomentumEMA'),
        ...     dict(type='mmema.EMAMonitorHook'),
        ... ]
    """

    priority = 55  # after EMAHook (NORMAL, 50) has updated, before LoggerHook (60) writes

    def __init__(self, interval: int | None = None, check_ranks: int | None = None):
        for name, value in (('interval', interval), ('check_ranks', check_ranks)):
            if value is not None:
                check_integer(name, value)
        self.interval = interval
        self.check_ranks = check_ranks

    def before_train(self, runner: Runner) -> None:
        """Find the EMAHook and the LoggerHook of the run."""
        self._differing_buffers: set = set()  # those that a warning has named
        self._ema_hook = ema_hook_of(runner)
        loggers = [hook for hook in runner.hooks if isinstance(hook, LoggerHook)] or [LoggerHook()]
        self._interval = self.interval or loggers[0].interval
        self._ignore_last = loggers[0].ignore_last

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        """Measure, if LoggerHook is about to write; compare the ranks, if that is due."""
        due = self.check_ranks and self.every_n_train_iters(runner, self.check_ranks)
        if due and get_world_size() > 1:
            self._compare_ranks(runner)
        if not self.every_n_inner_iters(batch_idx, self._interval):
            # LoggerHook also writes at the end of an epoch that is shorter than its interval.
            writes = len(runner.train_dataloader) <= self._interval or not self._ignore_last
            last = self.end_of_epoch(runner.train_dataloader, batch_idx)
            if self.interval is not None or not (last and writes):
                return
        for name, average in averages_of(self._ema_hook).items():
            distance = relative_distance(average.module, runner.model)
            for key, value in {**state_of(average), 'distance': distance}.items():
                runner.message_hub.update_scalar(f'{scalars_of(name)}{key}', value)

    def _compare_ranks(self, runner: Runner) -> None:
        """Raise RunError if the ranks do not have the same numbers; warn of buffers."""
        compared = {'the model': followed(runner.model)}
        for name, average in averages_of(self._ema_hook).items():
            label = 'the average' if name == MAIN else f'the average {name!r}'
            compared[label] = average.module
            compared[f'the state of {label}'] = counters_of(average)
        for label, module in compared.items():
            parameters, buffers = names_that_differ(module)
            if parameters:
                raise RunError(
                    f'all ranks must have the same numbers, but after {runner.iter + 1} iterations '
                    f'{listed(parameters)} of {label} differ. Look for code that changes them on '
                    'some ranks only, or for ranks that began with other weights.'
                )
            if label == 'the model':
                self._warn_of_buffers(buffers)

    def _warn_of_buffers(self, names: list[str]) -> None:
        new = [name for name in names if name not in self._differing_buffers]
        self._differing_buffers.update(new)
        if new:
            warn(
                f'the ranks have different buffers in the model: {listed(new)}. Each rank '
                'evaluates with its own, and those of rank 0 are saved. sync_bn, or '
                'broadcast_buffers=True of MMDistributedDataParallel, keeps them alike.'
            )


def counters_of(ema_model: BaseAveragedModel) -> nn.Module:
    """Return the counter and the live values of an averaged model, as parameters of a module."""
    counters = nn.Module()
    for name, value in ema_model.state_dict().items():
        if not name.startswith('module.') and name != 'record':
            value = nn.Parameter(value, requires_grad=False)
            counters.register_parameter(name.replace('.', ' '), value)
    return counters


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
