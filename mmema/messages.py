"""Texts for people: warnings in the run's log, lists of names, refusals of a run."""

from __future__ import annotations

import logging
from typing import Iterable

from mmengine.logging import print_log


class RunError(ValueError):
    """A run that cannot work as it is configured; the text says why and what to change."""


def warn(message: str) -> None:
    """Write a warning into the log of the current run."""
    print_log(message, logger='current', level=logging.WARNING)


def inform(message: str) -> None:
    """Write a line into the log of the current run."""
    print_log(message, logger='current', level=logging.INFO)


def listed(names: Iterable[str]) -> str:
    """Return the first three names, and how many more there are, in one line."""
    names = list(names)
    more = f' and {len(names) - 3} more' if len(names) > 3 else ''
    return ', '.join(map(repr, names[:3])) + more
