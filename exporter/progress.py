"""Progress of long work: a rich bar with ETA on a terminal, silence elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar


class Task(Protocol):
    """One piece of work with a known number of steps."""

    def advance(self, steps: int = 1) -> None:
        """Mark `steps` more steps as done."""


class Progress(Protocol):
    """Where a stage reports how far it is."""

    def task(self, title: str, total: int) -> AbstractContextManager[Task]:
        """Open a task of `total` steps; leaving the context closes it."""

    def note(self, line: str) -> None:
        """Print one line that stays."""


class _NullTask:
    def advance(self, steps: int = 1) -> None:
        pass


class NullProgress:
    """Says nothing: for tests and for use as a library."""

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        """Open a task that prints nothing."""
        yield _NullTask()

    def note(self, line: str) -> None:
        """Print nothing."""


class _RichTask:
    def __init__(self, bar: RichBar, title: str, total: int) -> None:
        self._bar = bar
        self._id = bar.add_task(title, total=total)

    def advance(self, steps: int = 1) -> None:
        self._bar.advance(self._id, steps)


class RichProgress:
    """Bars with count, elapsed time and ETA on a terminal; on a pipe only the notes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        """Show a bar while the context is open; it vanishes when done, so that the notes stay readable."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with RichBar(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as bar:
            yield _RichTask(bar, title, total)

    def note(self, line: str) -> None:
        """Print one line above the bars."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
