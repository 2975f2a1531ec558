"""Progress and notes on a plain terminal, without rich."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_WIDTH = 24
_CLEAR = "\r\x1b[K"


class _PlainTask:
    """One bar; drawn at most ten times a second."""

    def __init__(self, stream: TextIO | None, title: str, total: int) -> None:
        self._stream, self._title, self._total = stream, title, max(total, 1)
        self._done, self._start, self._drawn = 0, time.monotonic(), 0.0
        self._draw()

    def advance(self, steps: int = 1) -> None:
        """Mark `steps` more steps as done."""
        self._done = min(self._done + steps, self._total)
        if time.monotonic() - self._drawn > 0.1 or self._done == self._total:
            self._draw()

    def _draw(self) -> None:
        if self._stream is None:
            return
        self._drawn = time.monotonic()
        filled = _WIDTH * self._done // self._total
        bar = "#" * filled + "." * (_WIDTH - filled)
        seconds = int(self._drawn - self._start)
        self._stream.write(f"{_CLEAR}{self._title} [{bar}] {self._done}/{self._total} {seconds} s")
        self._stream.flush()


class PlainProgress:
    """A bar on a terminal, and notes; elsewhere the notes alone. With `quiet` neither."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[_PlainTask]:
        """Show a bar while the context is open; it vanishes when done."""
        bar = self._stream if self._stream.isatty() and not self._quiet else None
        try:
            yield _PlainTask(bar, title, total)
        finally:
            if bar is not None:
                bar.write(_CLEAR)
                bar.flush()

    def note(self, line: str) -> None:
        """Print one line that stays."""
        if not self._quiet:
            self._stream.write(line + "\n")
            self._stream.flush()
