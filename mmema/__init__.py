"""Restartable exponential moving averages of weights for MMEngine, MMYOLO and MMDetection."""

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
from .strategy import FullyShardStrategy
from .swap import averaged_weights

__version__ = '0.1.0'
__all__ = [
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
