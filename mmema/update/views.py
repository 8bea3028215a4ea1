"""View of a source: the tensors that an average follows, and whether they are still the same."""

from __future__ import annotations

from typing import Callable

from torch import Tensor, nn

from .staleness import Snapshot


class View:
    """Base of the views of a source; a new kind of source is a new view.

    A follower pairs the average with ``module`` and blends from there. A view can stand on another
    one, whose ``module`` it reads.
    """

    source: nn.Module  # as an update is given it
    module: nn.Module  # with the names of the source, and the tensors to follow
    # Reduces a tensor over the ranks that have the other parts of the source, if there are any.
    reduced: Callable[[Tensor, str], Tensor] | None = None
    # Whether `fetch` returns before the tensors have arrived.
    is_late = False

    def holds(self) -> bool:
        """Return whether ``module`` still has the tensors of the source."""
        raise NotImplementedError

    def fetch(self, follower, with_blended: bool) -> None:
        """Begin to bring the tensors of a late view, the blended ones only if wanted."""

    def wait(self) -> None:
        """Wait until all tensors of a late view have arrived."""


class LocalView(View):
    """View of a source whose own tensors are followed, where they are."""

    def __init__(self, source: nn.Module):
        self.source = self.module = source
        self._objects = Snapshot(source)

    def holds(self) -> bool:
        return self._objects.holds()
