"""An interrupt is not lost where Python cannot raise it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys, time
from exporter.interrupts import lose_no_interrupt

class Gone:
    def __del__(self):
        raise {error}

if {kept}:
    lose_no_interrupt()
Gone()
try:
    for _ in range(100 if {kept} else 3):
        time.sleep(0.05)
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize(
    ("error", "kept", "answer", "reported"),
    [
        ("KeyboardInterrupt", True, "interrupted", False),
        ("KeyboardInterrupt", False, "not interrupted", True),
        ("ValueError", True, "not interrupted", True),
    ],
)
def test_an_interrupt_in_a_finalizer_comes_again(error: str, kept: bool, answer: str, reported: bool) -> None:
    code = CODE.format(error=error, kept=kept)
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == answer
    assert (error in run.stderr) == reported
