"""Counter of optimizer steps, since an average is updated once for each."""

from __future__ import annotations

from typing import Iterator

from torch.optim import Optimizer

from ..messages import warn


class OptimizerSteps:
    """Counter of the optimizer steps in an iteration.

    Gradient accumulation and mixed precision skip steps, so the optimizers themselves are watched,
    with torch's hooks; of one that wraps another, such as Lookahead or DeepSpeed's, the inner one
    where only that calls them. Where none does, MMEngine's ``should_update()`` decides.
    """

    def __init__(self):
        self._handles: list = []
        self._steps = 0
        self._iterations = 0
        self._due = 0  # iterations that should have made a step
        self._any = False  # whether there has been one
        self._warned = False

    def begin_iteration(self, optim_wrapper) -> None:
        """Count from zero; the optimizers may have been replaced."""
        for handle in self._handles:
            handle.remove()
        optimizers = [getattr(one, 'optimizer', None) for one in _wrappers_in(optim_wrapper)]
        watched = [[*_watchable(one)] for one in optimizers]
        self._handles = []
        if all(watched):
            self._handles = [
                one.register_step_post_hook(self._count) for found in watched for one in found
            ]
        self._steps = 0

    def _count(self, optimizer, args, kwargs) -> None:
        # Fused optimizers under GradScaler are called in any case and skip the step themselves.
        found_inf = getattr(optimizer, 'found_inf', None)
        if found_inf is None or not bool(found_inf):
            self._steps += 1

    def end_iteration(self, optim_wrapper) -> bool:
        """Return whether an optimizer has made a step in this iteration."""
        wrappers = _wrappers_in(optim_wrapper)
        should = any(getattr(one, 'should_update', lambda: True)() for one in wrappers)
        stepped = self._steps > 0 if self._handles else should
        self._iterations += 1
        self._due += should  # not while gradients accumulate
        self._any |= stepped
        return stepped

    @property
    def missed(self) -> int:
        """How many steps were due, as long as none was made."""
        return 0 if self._any else self._due

    def epoch_over(self, length: int) -> bool:
        """Return whether the last iteration was the last of so many."""
        return self._iterations % length == 0

    def report(self) -> None:
        """Warn, once, if there has been no step at all."""
        if self.missed and not self._warned:
            self._warned = True
            warn(
                f'the average has not moved: no optimizer told of a step in {self.missed} '
                'iterations. per_optimizer_step=False updates it at each iteration.'
            )


def _watchable(optimizer) -> Iterator[Optimizer]:
    """Yield an optimizer if it calls torch's hooks, else those that it wraps and that do."""
    # Optimizer.__init__ makes the dict and wraps the class's step; wrappers often do not call it,
    # and some make an empty dict themselves.
    calls_hooks = getattr(getattr(type(optimizer), 'step', None), 'hooked', False)
    has_hooks = ('register_step_post_hook', '_optimizer_step_post_hooks')
    if calls_hooks and all(hasattr(optimizer, name) for name in has_hooks):
        yield optimizer
        return
    for inner in getattr(optimizer, '__dict__', {}).values():
        if isinstance(inner, Optimizer) and inner is not optimizer:
            yield from _watchable(inner)


def _wrappers_in(optim_wrapper) -> list:
    """Return the wrappers in an OptimWrapperDict, or the one that is given."""
    several = hasattr(optim_wrapper, 'optim_wrappers')
    return [*optim_wrapper.values()] if several else [optim_wrapper]
