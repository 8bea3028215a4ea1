"""Counter of optimizer steps, since an average is updated once for each."""

from __future__ import annotations

from ..messages import warn


class OptimizerSteps:
    """Counter of the optimizer steps in an iteration.

    Gradient accumulation and mixed precision skip steps, so the optimizers themselves are watched,
    with torch's hooks. Where one has no such hooks, MMEngine's ``should_update()`` decides.
    """

    def __init__(self):
        self._handles: list = []
        self._steps = 0
        self._iterations_without: int | None = 0  # None after the first step, or the warning

    def begin_iteration(self, optim_wrapper) -> None:
        """Count from zero; the optimizers may have been replaced."""
        for handle in self._handles:
            handle.remove()
        optimizers = [getattr(one, 'optimizer', None) for one in _wrappers_in(optim_wrapper)]
        # DeepSpeed's, which steps where it has accumulated enough, has torch's inside.
        optimizers = [
            one if _has_hooks(one) else getattr(one, 'optimizer', one) for one in optimizers
        ]
        watchable = all(map(_has_hooks, optimizers))
        watched = optimizers if watchable else []
        self._handles = [one.register_step_post_hook(self._count) for one in watched]
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
        if stepped:
            self._iterations_without = None
        elif self._iterations_without is not None:  # none was due while gradients accumulate
            self._iterations_without += should
        return stepped

    def report(self) -> None:
        """Warn, once, if there has been no step at all."""
        if self._iterations_without:
            warn(
                'the average has not moved: no optimizer told of a step in '
                f'{self._iterations_without} iterations. per_optimizer_step=False updates it at '
                'each iteration.'
            )
            self._iterations_without = None


def _has_hooks(optimizer) -> bool:
    return hasattr(optimizer, 'register_step_post_hook')


def _wrappers_in(optim_wrapper) -> list:
    """Return the wrappers in an OptimWrapperDict, or the one that is given."""
    several = hasattr(optim_wrapper, 'optim_wrappers')
    return [*optim_wrapper.values()] if several else [optim_wrapper]
