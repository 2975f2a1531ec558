"""Progress for tests: what was noted, and a run that is interrupted at a chosen step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from exporter.progress import NullProgress, Task


class Notes(NullProgress):
    """Keeps the `lines` that were noted."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


class InterruptedProgress(NullProgress):
    """Ends the run like Ctrl-C after so many steps of its tasks; `begun` are the titles of those that began."""

    def __init__(self, steps: int = 1000) -> None:
        self.begun: list[str] = []
        self._left = steps

    def advance(self, steps: int = 1) -> None:
        self._left -= steps
        if self._left < 0:
            raise KeyboardInterrupt

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        self.begun.append(title)
        yield self
