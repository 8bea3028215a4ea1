"""Facts of a run that decide when its restarts take place."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmengine.hooks import EMAHook as StockEMAHook
from mmengine.runner import IterBasedTrainLoop, Runner

from ..run import last_of, validation_follows
from .rewind import checkpoint_hooks
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
    by_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop)
    epoch_length = len(runner.train_dataloader) if by_epoch else None
    begin_epoch, begin_iter = max(ema_hook.begin_epoch - 1, 0), max(ema_hook.begin_iter - 1, 0)
    wrapper, loop = runner.optim_wrapper, runner.train_loop
    several = hasattr(wrapper, 'optim_wrappers')  # an OptimWrapperDict
    accumulation = 1
    # MMEngine's EMAHook has no such attribute: it updates at every iteration.
    if getattr(ema_hook, 'per_optimizer_step', False):
        wrappers = wrapper.values() if several else [wrapper]
        # With several optimizers the step of the most frequent.
        accumulation = min(getattr(each, '_accumulative_counts', 1) for each in wrappers)
    first_best = None
    if any(hook.save_best is not None for hook in checkpoint_hooks(runner)):
        last = last_of(loop)
        first = next((now for now in range(1, last) if validation_follows(loop, now)), last)
        first_best = first * (epoch_length or 1)
    return RunFacts(
        iterations=runner.max_iters,
        epoch_length=epoch_length,
        accumulation=accumulation,
        # Several optimizers are not told where the run ends; nor is DeepSpeed's.
        last_step=not several and hasattr(wrapper, 'should_update'),
        begin=begin_epoch * (epoch_length or 0) + begin_iter,
        switches=switches_of(runner) if by_epoch else {},
        first_best=first_best,
    )


def switches_of(runner: Runner) -> dict:
    """Return the 0-based epochs before which hooks switch in this run, by the hook's name."""
    switches: dict = {}
    for hook in runner.hooks:
        classes = [cls.__name__ for cls in type(hook).__mro__]
        for name in set(FOLLOWED).intersection(classes):
            epochs = switches.setdefault(name, [])
            if name == 'SwitchRecipeHook':  # MMPretrain's, by the number of the epoch, from 1
                epochs.extend(number - 1 for number in hook.schedule if number >= 1)
                continue
            if hasattr(hook, 'switch_epoch'):
                epoch = hook.switch_epoch
            else:  # YOLOXModeSwitchHook compares epoch + 1, so it switches one epoch earlier
                epoch = runner.max_epochs - hook.num_last_epochs - 1
            # From that epoch on, or, as MMYOLO's YOLOXModeSwitchHook, in that one or never.
            if epoch >= 0 or hasattr(hook, '_has_switched'):
                epochs.append(max(epoch, 0))
    return switches
