"""A progress bar on standard error."""

from __future__ import annotations

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn


class ProgressBar:
    """A bar of so many steps, which several threads may move; shown while it is entered."""

    def __init__(self, label, total):
        columns = *Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn()
        self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
        self._task = self._bar.add_task(label, total=total)

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *exception):
        self._bar.stop()

    def advance(self, steps=1):
        self._bar.advance(self._task, steps)

    def say(self, line):
        """Print a line above the bar."""
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
