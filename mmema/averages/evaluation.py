"""Evaluation by a validation loop of MMEngine, with other hooks than the run's or with none."""

from __future__ import annotations

from copy import copy
from typing import Callable

from mmengine.evaluator import Evaluator
from mmengine.runner import Runner, ValLoop
from mmengine.runner.base_loop import BaseLoop

from ..messages import RunError
from ..run import kept_rng


class RunnerView:
    """A runner that calls hooks in another way; all else is the runner's own."""

    def __init__(self, runner: Runner, call_hook: Callable):
        self._runner = runner
        self.call_hook = call_hook

    def __getattr__(self, name: str):
        return getattr(self._runner, name)


def evaluate(loop: ValLoop, call_hook: Callable) -> dict:
    """Run MMEngine's validation loop, and return the metrics.

    Args:
        loop: The loop of the run, with its dataloader and evaluator.
        call_hook: Called in place of ``Runner.call_hook``.
    """
    own = copy(loop)
    own._runner = RunnerView(loop.runner, call_hook)
    try:
        return ValLoop.run(own)
    finally:
        for metric in loop.evaluator.metrics:
            metric.results.clear()  # those of a validation that failed halfway


def evaluate_quietly(loop: ValLoop) -> dict:
    """Evaluate the weights that the model has, without any hook, and return the metrics.

    Random numbers stay as they are: an iterator over a dataloader draws one.
    """
    quiet = copy(loop)
    quiet.val_loss = {}  # what the loop has collected is of other weights
    with kept_rng():
        return evaluate(quiet, lambda name, **kwargs: None)


class EvaluatorView:
    """An evaluator whose metrics are given to a function, which returns those to be used."""

    def __init__(self, evaluator: Evaluator, use: Callable[[dict], dict]):
        self._evaluator = evaluator
        self._use = use

    def evaluate(self, size: int) -> dict:
        return self._use(self._evaluator.evaluate(size))

    def __getattr__(self, name: str):
        return getattr(self._evaluator, name)


def refuse_other_loops(loop: BaseLoop | None) -> None:
    """Raise RunError if several weights cannot be evaluated in a validation of a loop."""
    if loop is None or type(loop).run is ValLoop.run or hasattr(loop, 'weights'):  # EMAValLoop
        return
    raise RunError(
        f"a ladder must be evaluated by MMEngine's ValLoop, got a {type(loop).__name__}. Set "
        "val_cfg=dict(type='ValLoop')."
    )
