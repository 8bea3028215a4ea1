"""Selection: the tensors of a source that are blended; all others are copied at every update."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import FrozenSet, NamedTuple, Tuple

from torch import Tensor

from .buffers import constrained_buffers, masks_in
from .finite import is_number
from .pairs import canonical_name, memory_of, named_tensors
from .views import View


class Selected(NamedTuple):
    """The tensors of a source by what an update does with them, each under all of its names."""

    blended: FrozenSet[str]
    masks: FrozenSet[str]  # copied, and infinite by intention


class Selection(NamedTuple):
    """Rules that tell blended from copied tensors; they hold for any source."""

    update_buffers: bool
    exclude: Tuple[str, ...] = ()  # patterns of names

    def of(self, view: View) -> Selected:
        """Select from the tensors of a view; it must not be a late one, whose values are to come.

        A tensor is excluded under any of its names. No buffer is blended that no blend preserves.
        """
        tensors = [*named_tensors(view.module)]
        masks = {id(tensor) for tensor in masks_in(view.source)}
        copied = masks | {id(tensor) for tensor in constrained_buffers(view.source)}
        excluded = {memory_of(tensor) for name, tensor, _ in tensors if self._excludes(name)}
        blended = (
            name
            for name, tensor, is_buffer in tensors
            if is_number(tensor)
            and (not is_buffer or self._blends(tensor))
            and id(tensor) not in copied
            and memory_of(tensor) not in excluded
        )
        named_masks = (name for name, tensor, _ in tensors if id(tensor) in masks)
        return Selected(frozenset(blended), frozenset(named_masks))

    def _blends(self, buffer: Tensor) -> bool:
        return self.update_buffers and buffer.element_size() > 1  # none of eight bits can be

    def _excludes(self, name: str) -> bool:
        return any(fnmatchcase(canonical_name(name), pattern) for pattern in self.exclude)
