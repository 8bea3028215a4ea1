"""What hooks ask of a strategy of MMEngine's FlexibleRunner."""

from __future__ import annotations

from mmengine.runner import Runner
from mmengine.runner.checkpoint import weights_to_cpu
from torch import nn

from ..messages import RunError
from ..update.pairs import unwrapped
from ..update.refusals import refuse_pieces
from ..update.sharded import is_sharded

WAYS_OUT = {'DeepSpeedStrategy': 'mmema.DeepSpeedStrategy', 'ColossalAIStrategy': 'DDPStrategy'}


class StrategyTraits:
    """Properties of a strategy that hooks depend on, as MMEngine's own strategies have them.

    A strategy with other properties inherits from this class, too.
    """

    saves_parts = False  # every rank takes part in saving a sharded model
    trains_a_copy = False  # of the weights; it belongs to the optimizer

    def to_save(self, state: dict) -> dict:
        """Return a state as it can be saved: on the CPU."""
        return weights_to_cpu(state)

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is written."""


def traits_of(runner: Runner) -> StrategyTraits:
    """Return the traits of a run's strategy; the plain Runner has none."""
    strategy = getattr(runner, 'strategy', None)
    return strategy if isinstance(strategy, StrategyTraits) else StrategyTraits()


def refuse_unsaved(runner: Runner) -> None:
    """Raise RunError for the two strategies of MMEngine that save without calling hooks."""
    strategy = getattr(runner, 'strategy', None)
    if isinstance(strategy, StrategyTraits):
        return
    for cls in type(strategy).__mro__:
        if cls.__name__ in WAYS_OUT:
            raise RunError(
                "an average must be saved to be resumed, but the checkpoints of MMEngine's "
                f'{cls.__name__} cannot hold it. Train with '
                f"strategy=dict(type='{WAYS_OUT[cls.__name__]}'), or without EMAHook."
            )


def checked_source(runner: Runner) -> nn.Module:
    """Return the model that averages follow; raise RunError if they cannot, or cannot be saved."""
    saves_parts, saver = traits_of(runner).saves_parts, getattr(runner, 'strategy', runner)
    refuse_pieces(runner.model)
    source = unwrapped(runner.model)
    if is_sharded(source) and not saves_parts:
        raise RunError(
            'a model that is sharded by FSDP2 must be saved by all ranks, but '
            f"{type(saver).__name__} saves on rank 0 alone. Let runner_type='FlexibleRunner', "
            "strategy=dict(type='mmema.FullyShardStrategy') shard it."
        )
    return source
