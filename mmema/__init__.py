"""Restartable exponential moving averages of weights for MMEngine, MMYOLO and MMDetection."""

from typing import TYPE_CHECKING

try:
    import mmengine
except ModuleNotFoundError as error:
    if error.name != 'mmengine':
        raise
    # No dependency of the package: two packages have this module, and pip would put one of them
    # over the other.
    raise ModuleNotFoundError(
        'mmema needs MMEngine, which is not installed: pip install mmengine, or its maintained '
        'fork: pip install onedl-mmengine',
        name='mmengine',
    ) from None
if mmengine.utils.digit_version(mmengine.__version__) < mmengine.utils.digit_version('0.8'):
    raise ImportError(f'mmema needs MMEngine 0.8 or later, found {mmengine.__version__}')

from .averaged import ExpMomentumEMA
from .checkpoints.torch_load import allow_mmengine_classes
from .hooks.ema import EMAHook
from .hooks.monitor import EMAMonitorHook
from .hooks.recalibrate import EMARecalibrateHook
from .hooks.restart import EMARestartHook
from .loops import EMAValLoop
from .restartable import (
    RestartableAnnealingEMA,
    RestartableConstantEMA,
    RestartableDebiasedEMA,
    RestartableExpMomentumEMA,
    RestartablePowerFunctionEMA,
    RestartablePowerRampEMA,
    RestartableThresholdEMA,
    RestartableUniformAverage,
)
from .swap import averaged_weights

if TYPE_CHECKING:
    from .sharded import DeepSpeedStrategy, FullyShardStrategy

__version__ = '0.1.0'
__all__ = [
    'DeepSpeedStrategy',
    'EMAHook',
    'EMAMonitorHook',
    'EMARecalibrateHook',
    'EMARestartHook',
    'EMAValLoop',
    'ExpMomentumEMA',
    'FullyShardStrategy',
    'RestartableAnnealingEMA',
    'RestartableConstantEMA',
    'RestartableDebiasedEMA',
    'RestartableExpMomentumEMA',
    'RestartablePowerFunctionEMA',
    'RestartablePowerRampEMA',
    'RestartableThresholdEMA',
    'RestartableUniformAverage',
    '__version__',
    'averaged_weights',
]

allow_mmengine_classes()


def __getattr__(name: str):
    """Import the strategies where they are first asked for; few runs need them."""
    if name in ('DeepSpeedStrategy', 'FullyShardStrategy'):
        from . import sharded

        return getattr(sharded, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
