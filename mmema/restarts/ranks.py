"""Decisions of rank 0 for all ranks."""

from __future__ import annotations

from typing import Callable

from mmengine.dist import broadcast_object_list, is_main_process


def on_main(decide: Callable):
    """Return on every rank what ``decide()`` returns, or raises, on rank 0."""
    try:
        answer = [decide() if is_main_process() else None, None]
    except Exception as error:  # the other ranks wait for an answer, so they get this one
        answer = [None, error]
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
