"""Interrupts that Python would only report."""

from __future__ import annotations

import _thread
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

# Behind whatever is being thrown away; who has pressed Ctrl-C does not notice.
_SECONDS = 0.05


def lose_no_interrupt() -> None:
    """Let a KeyboardInterrupt come again that came in a `__del__`, as of libraries that are being imported, where
    Python can only say that it is ignored."""
    sys.unraisablehook = _again


def _again(ignored: UnraisableHookArgs) -> None:
    if not issubclass(ignored.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(ignored)
        return
    # Later: here it would be ignored once more.
    timer = threading.Timer(_SECONDS, _thread.interrupt_main)
    timer.daemon = True
    timer.start()
