"""Replicas: tensors of which several ranks must have the same numbers, compared by checksums."""

from __future__ import annotations

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from .pairs import canonical_name, named_tensors
from .sharded import Parts


def names_that_differ(module: nn.Module) -> tuple[list[str], list[str]]:
    """Return the parameters and the buffers whose bits differ between ranks, on every rank.

    Every rank must call it. Of a sharded model a part is compared with its replicas, a buffer with
    those of all ranks.

    Args:
        module: A model without wrappers, or `mmema.update.sharded.Parts`.
    """
    tensors = [*named_tensors(module)]
    sums = [checksum(tensor) for _, tensor, _ in tensors]
    both = torch.stack([each.to(sums[0].device) for each in sums]).cpu()
    both = torch.stack([both, -both])  # one maximum gives the largest and the smallest
    everywhere = both.clone()
    all_reduce(everywhere, 'max')
    if isinstance(module, Parts):
        among_replicas = both.clone()
        for group in module.replica_groups():
            all_reduce(among_replicas, 'max', group=group)
        is_part = torch.tensor([name in module.layouts for name, _, _ in tensors])
        everywhere = torch.where(is_part, among_replicas, everywhere)
    differ = (everywhere[0] != -everywhere[1]).int()
    all_reduce(differ, 'max')
    found: tuple = ([], [])
    for (name, _, is_buffer), differs in zip(tensors, differ.tolist()):
        if differs:
            found[is_buffer].append(canonical_name(name))
    return found


def checksum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bits, in words of four bytes or one; the order has no effect."""
    numbers = tensor.detach().contiguous().reshape(-1)
    if numbers.is_complex():
        numbers = torch.view_as_real(numbers).reshape(-1)
    if numbers.dtype == torch.bool:
        return numbers.sum()
    words = torch.int32 if numbers.element_size() % 4 == 0 else torch.uint8
    return numbers.view(words).sum(dtype=torch.int64)
