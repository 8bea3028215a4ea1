"""One average of a run: updates, restarts, state and reports, apart from when the hook asks."""

from __future__ import annotations

from typing import Callable, Collection

from mmengine.model import BaseAveragedModel
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from torch import nn

from ..averaged import MomentumAveragedModel
from ..checkpoints.resume import check_ema_state
from ..messages import RunError, inform, listed, warn
from ..record import Record
from ..restarts.advice import beyond_the_end
from ..restarts.controller import RestartController
from ..restarts.progress import RuleProgress
from ..run import RunFacts, label_of
from ..swap import copy_weights
from ..update.finite import names_of_non_finite
from ..update.sharded import Parts
from .config import AverageConfig
from .units import settle_average, told_least_change


class TrackedAverage:
    """One average of a run: a copy of the model until training begins, then weights of its own.

    ``init_weights`` and loading change the model after the average was made, so the copy is made
    again until then.
    """

    def __init__(self, config: AverageConfig, source: nn.Module, name: str):
        self.config = config
        self.name = name
        is_rung = config.blends_of_gamma is not None
        self.label = f'the average {name!r}' if is_rung else label_of(name)
        given = dict(model=source)
        self.ema_model: BaseAveragedModel = MODELS.build(config.of_model, default_args=given)
        if config.auto_interval and isinstance(self.ema_model, MomentumAveragedModel):
            self.ema_model.defers_copies = True
        self.has_own_weights = False
        self.progress = None if config.rule is None else RuleProgress(config.rule)
        progresses = [] if self.progress is None else [self.progress]
        self.restarts = RestartController(progresses, name)
        self._settled = False
        self._non_finite = set(self._names_of_non_finite())  # masks, for example

    def settle(self, base: int | None, batch: int | None, facts: RunFacts) -> None:
        """Give the average the momentum and gamma of its run, once; see :func:`.units.settle`."""
        if self._settled or base is None and self.config.horizon is None:
            return
        self._settled = True
        text = settle_average(self.ema_model, self.config, base, batch, facts)
        inform(f'EMAHook, {self.label}: {text or "no momentum to scale"}')

    def copy(self, source: nn.Module) -> None:
        if not self.has_own_weights:
            copy_weights(self.ema_model.module, source)

    def update(self, source: nn.Module, begun: bool, iteration: int) -> None:
        """Update the average at the end of an iteration; before it has begun it copies."""
        ema, record = self.ema_model, self.record
        record.iteration = iteration
        if begun:
            ema.update_parameters(source)
            return
        was_restarted = record.copy_is_due
        counter = int(ema.steps) if was_restarted else 0
        ema.steps.zero_()  # an update at 0 copies, except for values that it skips
        ema.update_parameters(source)
        ema.steps.fill_(counter)
        record.copy_is_due = was_restarted

    @property
    def record(self) -> Record:
        """The record of the average; of a class without one, another that nobody sees."""
        return getattr(self.ema_model, 'record', None) or Record()

    def report(self) -> None:
        """Warn of tensors that were skipped, and of values that are no longer finite."""
        if hasattr(self.ema_model, 'log_skipped'):
            self.ema_model.log_skipped()
        names = self._names_of_non_finite()
        new = [name for name in names if name not in self._non_finite]
        self._non_finite = set(names)
        if new:
            warn(
                f'not finite in {self.label}: {listed(new)} (after {int(self.ema_model.steps)} '
                'updates). They stay so until a hard restart; skip_non_finite=True keeps such '
                'values out.'
            )

    def _names_of_non_finite(self) -> list[str]:
        module = self.ema_model.module
        return names_of_non_finite(module, module.reduced if isinstance(module, Parts) else None)

    def begin(self, facts: RunFacts, evaluated: Collection[str]) -> None:
        """Check momentum and restart rule at the beginning of a training, and tell what is lost.

        Args:
            facts: Those of the run.
            evaluated: The averages of which validations give metrics.
        """
        rule = self.config.rule
        try:
            text, is_much = told_least_change(self.ema_model, facts.updates)
            if rule is not None:
                self.restarts.begin(self.ema_model, facts)
        except RunError as error:
            raise RunError(f'{self.label}: {error}') from None
        if text:
            (warn if is_much else inform)(f'{self.label}: {text}')
        if rule is None:
            return
        if rule.plateau and self.name not in evaluated:
            raise RunError(
                f'{self.label}: on_plateau watches the metrics of this average, but no validation '
                "gives them. Set val_cfg=dict(type='mmema.EMAValLoop')."
            )
        for line in beyond_the_end([rule], facts):
            warn(f'{self.label}: {line}')

    def state(self, to_save: Callable) -> dict:
        restart = self.progress and self.progress.state_dict()
        return {'state_dict': to_save(self.ema_model.state_dict()), 'restart': restart}

    def resume(self, saved: dict, source: nn.Module, strict: bool, file: str) -> None:
        try:
            check_ema_state({'ema_state_dict': saved['state_dict']}, self.ema_model, file)
            copy_weights(self.ema_model.module, source)  # no state has non-persistent buffers
            self.ema_model.load_state_dict(saved['state_dict'], strict=strict)
        except (RunError, RuntimeError) as error:
            raise RunError(f'{self.label}: {error}') from None
        self.has_own_weights = True
        if self.progress is not None and saved['restart'] is not None:
            self.progress.load_state_dict(saved['restart'])

    def load(self, checkpoint: dict, strict: bool) -> None:
        """Load the weights in a checkpoint; the average is a copy of the model from now on."""
        _load_checkpoint_to_model(self.ema_model.module, checkpoint, strict, 'current')
        self.has_own_weights = False
        if self.record.updates:
            self.ema_model.record = self.record.restarted('weights loaded')
