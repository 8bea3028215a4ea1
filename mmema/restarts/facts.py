"""Facts of a run that decide when its restarts take place."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmengine.hooks import EMAHook as StockEMAHook
from mmengine.runner import IterBasedTrainLoop, Runner

from ..run import last_of, validation_follows
from .rewind import saves_best
from .rule import FOLLOWED, Moment


@dataclass(frozen=True)
class RunFacts:
    """Length of a run, its updates of the average, and its pipeline switches."""

    iterations: int
    epoch_length: int | None = None  # None in a run by iterations
    accumulation: int = 1  # iterations to one update of the average
    last_step: bool = True  # the last iteration updates, too, where accumulation does not divide
    begin: int = 0  # first iteration whose weights are blended rather than copied
    switches: dict = field(default_factory=dict)  # epochs by the name of the hook that switches
    first_best: int | None = None  # iterations before the first best checkpoint, if there is one

    @property
    def by_epoch(self) -> bool:
        """Whether the run is one by epochs."""
        return self.epoch_length is not None

    @property
    def updates(self) -> int:
        """Updates in all."""
        return (self.iterations + self.last_step * (self.accumulation - 1)) // self.accumulation

    def update_of(self, iteration: int) -> int:
        """Return the index of the first update at or after an iteration."""
        return self.updates if iteration >= self.iterations else iteration // self.accumulation

    def iteration_of(self, update: int) -> int:
        """Return the iteration at whose end an update takes place."""
        return min((update + 1) * self.accumulation, self.iterations) - 1

    def iteration_at(self, moment: Moment) -> int:
        """Return the iteration before which a moment is."""
        return moment.at * (self.epoch_length if moment.unit == 'epoch' else 1)

    def end(self, unit: str) -> int:
        """Return the number of epochs or iterations."""
        return self.iterations // (self.epoch_length if unit == 'epoch' else 1)


def facts_of(runner: Runner, ema_hook: StockEMAHook) -> RunFacts:
    """Return the facts of a run whose average is updated by ``ema_hook``."""
    by_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop)
    epoch_length = len(runner.train_dataloader) if by_epoch else None
    # MMEngine's EMAHook has no such attribute: it updates at every iteration.
    per_step = getattr(ema_hook, 'per_optimizer_step', False)
    begin_epoch, begin_iter = max(ema_hook.begin_epoch - 1, 0), max(ema_hook.begin_iter - 1, 0)
    first_best = None
    if saves_best(runner):
        first_best = _first_validation(runner.train_loop) * (epoch_length or 1)
    return RunFacts(
        iterations=runner.max_iters,
        epoch_length=epoch_length,
        accumulation=_accumulation(runner.optim_wrapper) if per_step else 1,
        # OptimWrapperDict does not tell its optimizers where the run ends.
        last_step=not hasattr(runner.optim_wrapper, 'optim_wrappers'),
        begin=begin_epoch * (epoch_length or 0) + begin_iter,
        switches=switches_of(runner) if by_epoch else {},
        first_best=first_best,
    )


def _accumulation(wrapper) -> int:
    """Return the iterations to a step; with several optimizers to that of the most frequent."""
    wrappers = wrapper.values() if hasattr(wrapper, 'optim_wrappers') else [wrapper]
    return min(getattr(wrapper, '_accumulative_counts', 1) for wrapper in wrappers)


def _first_validation(loop) -> int:
    """Return after how many epochs or iterations a loop validates first."""
    last = last_of(loop)
    return next((now for now in range(1, last + 1) if validation_follows(loop, now)), last)


def switches_of(runner: Runner) -> dict:
    """Return the 0-based epochs before which hooks switch in this run, by the hook's name."""
    switches: dict = {}
    for hook in runner.hooks:
        for name in FOLLOWED:
            if any(cls.__name__ == name for cls in type(hook).__mro__):
                switches.setdefault(name, []).extend(_switch_epochs(hook, runner.max_epochs))
    return switches


def _switch_epochs(hook, max_epochs: int) -> list:
    if hasattr(hook, 'switch_epoch'):
        epoch = hook.switch_epoch
    else:  # YOLOXModeSwitchHook compares epoch + 1, so it switches one epoch earlier
        epoch = max_epochs - hook.num_last_epochs - 1
    # From that epoch on, or, as MMYOLO's YOLOXModeSwitchHook, in that one or never.
    return [max(epoch, 0)] if epoch >= 0 or hasattr(hook, '_has_switched') else []
