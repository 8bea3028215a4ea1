"""What is not finite, in an average or in its source."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .direct import Pairing
from .pairs import named_tensors


def is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def flags(tensors: list[Tensor]) -> list[Tensor]:
    """Return for each tensor whether it is finite, as a bool on its device, without waiting.

    float32 and float64 are judged by their norm, in one fused pass: values above 1e18 count as not
    finite. A 16-bit norm overflows at 65504, so there every element is looked at.
    """
    found: list = [None] * len(tensors)
    fused, single = _sorted_out(tensors)
    for number in single:
        found[number] = tensors[number].isfinite().all()
    for numbers in fused:
        for number, flag in zip(numbers, _fused_flags([tensors[n] for n in numbers]).unbind()):
            found[number] = flag
    return found


def _sorted_out(tensors: list[Tensor]) -> tuple[list[list[int]], list[int]]:
    """Return the numbers of the tensors: lists for one fused pass each, and the others."""
    fused: dict = {}
    single = []
    for number, tensor in enumerate(tensors):
        if tensor.dtype in (torch.float32, torch.float64) and tensor.numel():
            fused.setdefault((tensor.dtype, tensor.device), []).append(number)
        else:
            single.append(number)
    return list(fused.values()), single


def _fused_flags(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).isfinite()


def names_of_non_finite(model: nn.Module) -> list[str]:
    """Return the names of the tensors of a model that hold NaN or infinity."""
    named = [(name, tensor.data) for name, tensor, _ in named_tensors(model) if is_number(tensor)]
    found = flags([tensor for _, tensor in named])
    return [name for (name, _), finite in zip(named, found) if not bool(finite)]


class Guard:
    """Leaves what is not finite in a source out of one update; counts it, tensor by tensor."""

    def __init__(self, pairing: Pairing):
        self.pairing = pairing
        blended = pairing.blended
        # Integers are finite.
        self.pairs = blended + [pair for pair in pairing.copied if is_number(pair.source)]
        self.is_blended = [True] * len(blended) + [False] * (len(self.pairs) - len(blended))
        self.exact = [pair for pair in pairing.copied if not is_number(pair.source)]
        self.skipped: list = [0] * len(self.pairs)
        self.sources = [pair.source for pair in self.pairs]
        fused, single = _sorted_out(self.sources)
        self.fused = [[self.sources[number] for number in numbers] for numbers in fused]
        self.single = [self.sources[number] for number in single]
        self.on_cpu = all(source.device.type == 'cpu' for source in self.sources)

    def sees_only_finite(self) -> bool:
        """Look at the source. Only the CPU is asked; elsewhere the answer is always False."""
        return (
            self.on_cpu
            and all(bool(_fused_flags(tensors).all()) for tensors in self.fused)
            and all(bool(flag) for flag in flags(self.single))
        )

    def update(self, momentum: float | None) -> None:
        """Blend (None: not at all; 1: copy) and copy whatever is finite, without waiting."""
        for number, (pair, finite) in enumerate(zip(self.pairs, flags(self.sources))):
            weight = momentum if self.is_blended[number] else 1.0
            if weight is not None:
                self.skipped[number] = self.skipped[number] + (~finite).long()
                average = pair.average
                source = pair.source.to(average.device, average.dtype)
                source = torch.where(finite.to(average.device), source, average)
                average.lerp_(source, weight) if weight < 1 else average.copy_(source)
        for pair in self.exact:
            pair.average.copy_(pair.source)

    def counts(self) -> dict[str, int]:
        """Return how often each tensor was left out; the only place that waits for the device."""
        counts = {pair.name: int(number) for pair, number in zip(self.pairs, self.skipped)}
        return {name: number for name, number in counts.items() if number}
