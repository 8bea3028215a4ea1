"""Blend plan: pairs grouped by the operator that blends or copies them."""

from __future__ import annotations

from typing import Dict, List, Tuple

import torch
from torch import Tensor

from .pairs import Pair, copy_all, sides


class BlendPlan:
    """Pairs, grouped for the fewest operators.

    Pairs of one dtype on one device go to torch's fused operators. Pairs that need a conversion go
    one by one.
    """

    def __init__(self, pairs: List[Pair]):
        fused: Dict[tuple, List[Pair]] = {}
        self.single: List[Pair] = []
        for pair in pairs:
            average, source = pair.average, pair.source
            if (average.dtype, average.device) == (source.dtype, source.device):
                # A fused kernel takes a list only if all pairs have one memory layout.
                same_layout = average.stride() == source.stride()
                fused.setdefault((average.dtype, average.device, same_layout), []).append(pair)
            else:
                self.single.append(pair)
        self.fused: List[Tuple[List[Tensor], List[Tensor]]] = [*map(sides, fused.values())]

    def lerp(self, momentum: float) -> None:
        """``avg <- (1 - momentum) avg + momentum src`` for every pair."""
        for averages, sources in self.fused:
            torch._foreach_lerp_(averages, sources, momentum)
        for pair in self.single:
            average = pair.average
            average.lerp_(pair.source.to(average.device, average.dtype), momentum)

    def copy(self) -> None:
        """``avg <- src`` for every pair."""
        for averages, sources in self.fused:
            copy_all(averages, sources)
        for pair in self.single:
            pair.average.copy_(pair.source)
