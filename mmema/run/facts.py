"""Facts of a run: its length, the updates of its averages, its pipeline switches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Iterable, Sequence

from mmengine.hooks import EMAHook as StockEMAHook
from mmengine.runner import IterBasedTrainLoop, Runner

from .config import ema_hook_in, epochs_of, hooks_in, is_by_epoch, is_ours, kind_of
from .live import checkpoint_hooks, last_of, validation_follows
from .switches import switches_of


@dataclass(frozen=True)
class Moment:
    """A time in a run: the beginning of the epoch, or the iteration, with a 0-based index."""

    unit: str  # 'epoch' or 'iter'
    at: int

    def __str__(self) -> str:
        return f'{self.unit} {self.at}'

    @classmethod
    def parse(cls, text: str) -> Moment:
        """Return the moment that ``str`` of one has written, as checkpoints keep it."""
        unit, at = text.split()
        return cls(unit, int(at))


@dataclass(frozen=True)
class RunFacts:
    """Length of a run, its updates of the average, and its pipeline switches."""

    iterations: int
    epoch_length: int | None = None  # None in a run by iterations
    accumulation: int = 1  # iterations to one update of the average
    last_step: bool = True  # the last iteration updates, too, where accumulation does not divide
    begin: int = 0  # first iteration whose weights are blended rather than copied
    switches: dict = field(default_factory=dict)  # epochs by the name of the hook that switches
    # Iterations before the first best checkpoint, if there is one; only known of a Runner.
    first_best: int | None = None

    @property
    def by_epoch(self) -> bool:
        return self.epoch_length is not None

    @property
    def updates(self) -> int:
        return (self.iterations + self.last_step * (self.accumulation - 1)) // self.accumulation

    def update_of(self, iteration: int) -> int:
        """Return the index of the first update at or after an iteration."""
        return self.updates if iteration >= self.iterations else iteration // self.accumulation

    def iteration_of(self, update: int) -> int:
        """Return the iteration at whose end an update takes place."""
        return min((update + 1) * self.accumulation, self.iterations) - 1

    def iteration_at(self, moment: Moment) -> int:
        return moment.at * (self.epoch_length if moment.unit == 'epoch' else 1)

    def end(self, unit: str) -> int:
        return self.iterations // (self.epoch_length if unit == 'epoch' else 1)


def facts_of(runner: Runner, ema_hook: StockEMAHook) -> RunFacts:
    """Return the facts of a run whose average is updated by ``ema_hook``."""
    wrapper, loop = runner.optim_wrapper, runner.train_loop
    by_epoch = not isinstance(loop, IterBasedTrainLoop)
    epoch_length = len(runner.train_dataloader) if by_epoch else None
    several = hasattr(wrapper, 'optim_wrappers')  # an OptimWrapperDict
    wrappers = wrapper.values() if several else [wrapper]
    first_best = None
    if any(hook.save_best is not None for hook in checkpoint_hooks(runner)):
        last = last_of(loop)
        first = next((now for now in range(1, last) if validation_follows(loop, now)), last)
        first_best = first * (epoch_length or 1)
    return _facts(
        runner.hooks,
        runner.max_iters,
        epoch_length,
        counts=[getattr(each, '_accumulative_counts', 1) for each in wrappers],
        # MMEngine's EMAHook has no such attribute: it updates at every iteration.
        per_step=getattr(ema_hook, 'per_optimizer_step', False),
        # DeepSpeed's wrapper is not told where the run ends.
        last_step=not several and hasattr(wrapper, 'should_update'),
        begin_epoch=ema_hook.begin_epoch,
        begin_iter=ema_hook.begin_iter,
        first_best=first_best,
    )


def facts_in_config(
    config: dict, epoch_length: int, iterations: int | None = None, deepspeed: dict | None = None
) -> RunFacts:
    """Return the facts of a run from its config, without a Runner.

    Args:
        config: MMEngine's Config, or plain values such as those of :func:`.config.read_config`. A
            setting that it lacks is taken to be MMEngine's default.
        epoch_length: The iterations of an epoch; of no use in a run by iterations.
        iterations: Those of the whole run. Defaults to None: as the config has it.
        deepspeed: The settings of DeepSpeed's engine, where a checkpoint has them. Defaults to
            None: those of the config's strategy, if it is DeepSpeed's.
    """
    by_epoch, hook = is_by_epoch(config), ema_hook_in(config)
    if iterations is None:
        train = config['train_cfg']
        iterations = epochs_of(config) * epoch_length if by_epoch else train['max_iters']
    strategy = config.get('strategy') or {}
    if not deepspeed and kind_of(strategy) == 'DeepSpeedStrategy':
        own = strategy.get('config')  # a dict, or a file of its settings
        deepspeed = {**(own if isinstance(own, dict) else {}), **strategy}
    wrapper = config.get('optim_wrapper') or {}
    inner = [each for each in wrapper.values() if isinstance(each, dict) and 'optimizer' in each]
    several = 'optimizer' not in wrapper and inner  # for a constructor of an OptimWrapperDict
    counts = [each.get('accumulative_counts', 1) for each in several or [wrapper]]
    if deepspeed:
        counts = [deepspeed.get('gradient_accumulation_steps', 1)]
    return _facts(
        hooks_in(config),
        iterations,
        epoch_length if by_epoch else None,
        counts=counts,
        per_step=is_ours(hook) and hook.get('per_optimizer_step', True),
        last_step=not (deepspeed or several),
        begin_epoch=hook.get('begin_epoch', 0),
        begin_iter=hook.get('begin_iter', 0),
    )


def _facts(
    hooks: Iterable,
    iterations: int,
    epoch_length: int | None,
    *,
    counts: Sequence[int],
    per_step: bool,
    last_step: bool,
    begin_epoch: int,
    begin_iter: int,
    first_best: int | None = None,
) -> RunFacts:
    """Return facts from what a Runner or a config says.

    ``counts`` are the iterations to a step of each optimizer, ``last_step`` is whether there is one
    at the last iteration, and ``begin_epoch`` and ``begin_iter`` are those of EMAHook, from 1.
    """
    switches = {}
    if epoch_length:
        found = switches_of(hooks, iterations // epoch_length)
        switches = {name: [switch.epoch for switch in each] for name, each in found.items()}
    begin = max(begin_epoch - 1, 0) * (epoch_length or 0) + max(begin_iter - 1, 0)
    # With several optimizers the step of the most frequent; they are not told where the run ends.
    accumulation = min(counts) if per_step else 1
    return RunFacts(iterations, epoch_length, accumulation, last_step, begin, switches, first_best)
