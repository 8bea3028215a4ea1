"""One average of a run: updates, state and reports, apart from when the hook asks for them."""

from __future__ import annotations

from mmengine.model import BaseAveragedModel
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from ..averaged import MomentumAveragedModel
from ..messages import listed, warn
from ..swap import copy_weights, non_persistent
from ..update.finite import names_of_non_finite


class RunAverage:
    """One average of a run: a copy of the model until training begins, then weights of its own.

    ``init_weights`` and loading change the model after the average was made, so the copy is made
    again until then.
    """

    def __init__(self, ema_model: BaseAveragedModel):
        self.ema_model = ema_model
        self.has_own_weights = False
        self._non_finite = set(names_of_non_finite(ema_model.module))  # masks, for example

    def copy(self, source: nn.Module) -> None:
        """Copy the source, unless the average has weights of its own."""
        if not self.has_own_weights:
            copy_weights(self.ema_model.module, source)

    def update(self, source: nn.Module, begun: bool) -> None:
        """Update the average; it is a copy of the source until blending has begun."""
        ema = self.ema_model
        if begun:
            ema.update_parameters(source)
        elif isinstance(ema, MomentumAveragedModel):
            ema.steps.zero_()
            ema.update_parameters(source)  # copies, except for values that it skips
            ema.steps.zero_()
        else:
            copy_weights(ema.module, source)

    def resume(self, state: dict, source: nn.Module, strict: bool) -> None:
        """Load an EMA state; non-persistent buffers, which no state has, are the source's."""
        self.ema_model.load_state_dict(state, strict=strict)
        module = self.ema_model.module
        copy_weights(module, source, only=non_persistent(module))
        self.has_own_weights = True

    def load(self, weights: dict, strict: bool) -> None:
        """Load weights of a model, of which the average is a copy from now on."""
        load_state_dict(self.ema_model.module, weights, strict=strict, logger='current')
        self.has_own_weights = False

    def report(self) -> None:
        """Warn of tensors that were skipped, and of values that are no longer finite."""
        if hasattr(self.ema_model, 'log_skipped'):
            self.ema_model.log_skipped()
        names = names_of_non_finite(self.ema_model.module)
        new = [name for name in names if name not in self._non_finite]
        self._non_finite = set(names)
        if new:
            warn(
                f'not finite in the average: {listed(new)} (after {int(self.ema_model.steps)} '
                'updates). They stay so until a hard restart; skip_non_finite=True keeps such '
                'values out.'
            )
