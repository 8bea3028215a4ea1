"""Restartable exponential moving averages of weights for MMEngine, MMYOLO and MMDetection."""

from .averaged import ExpMomentumEMA, RestartableExpMomentumEMA
from .checkpoint import trust_mmengine_checkpoints

__version__ = '0.1.0'
__all__ = ['ExpMomentumEMA', 'RestartableExpMomentumEMA', '__version__']

trust_mmengine_checkpoints()
