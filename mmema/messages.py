"""Texts for people: warnings in the run's log, lists of names, refusals of a run."""

from __future__ import annotations

import logging
from typing import Iterable, Sequence

from mmengine.logging import print_log


class RunError(ValueError):
    """A run that cannot work as it is configured; the text says why and what to change."""


def warn(message: str) -> None:
    """Write a warning into the log of the current run."""
    print_log(message, logger='current', level=logging.WARNING)


def inform(message: str) -> None:
    """Write a line into the log of the current run."""
    print_log(message, logger='current', level=logging.INFO)


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Return rows of cells as lines of text, each column as wide as its widest cell."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ('  '.join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows)
    return '\n'.join(line.rstrip() for line in lines)


def listed(names: Iterable[str]) -> str:
    """Return the first three names, and how many more there are, in one line."""
    names = list(names)
    more = f' and {len(names) - 3} more' if len(names) > 3 else ''
    return ', '.join(map(repr, names[:3])) + more
