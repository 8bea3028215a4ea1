"""Strategies for models that are sharded over ranks; optional, imported where a run names one."""

from .strategy import FullyShardStrategy
from .zero import DeepSpeedStrategy

__all__ = ['DeepSpeedStrategy', 'FullyShardStrategy']
