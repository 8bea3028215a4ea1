"""Selection: the tensors of a source that are blended; all others are copied at every update."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple, Tuple

from torch import nn

from .finite import is_number
from .pairs import canonical_name, memory_of, named_tensors


class Selection(NamedTuple):
    """Rules that tell blended from copied tensors; they hold for any source."""

    update_buffers: bool
    exclude: Tuple[str, ...] = ()  # patterns of names

    def blended_in(self, source: nn.Module) -> set:
        """Return the ids of the tensors of ``source`` that are blended.

        A tensor is excluded under any of its names.
        """
        tensors = [*named_tensors(source)]
        excluded = {memory_of(tensor) for name, tensor, _ in tensors if self._excludes(name)}
        return {
            id(tensor)
            for _, tensor, is_buffer in tensors
            if is_number(tensor)
            and (self.update_buffers or not is_buffer)
            and memory_of(tensor) not in excluded
        }

    def _excludes(self, name: str) -> bool:
        return any(fnmatchcase(canonical_name(name), pattern) for pattern in self.exclude)
