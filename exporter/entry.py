"""Where the `fp4export` command begins: `build` and `doctor` run where what the other commands import is missing."""

from __future__ import annotations

import sys
from typing import NoReturn


def run() -> NoReturn:
    """Run the command as this process and end it with the exit code."""
    from exporter.device.program import COMMANDS, main
    from exporter.interrupts import lose_no_interrupt

    lose_no_interrupt()
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        sys.exit(main(sys.argv[1:]))
    try:
        from exporter.cli import run as run_exports
    except ModuleNotFoundError as error:
        known = " and ".join(COMMANDS)
        sys.stderr.write(f"error: {error.name} is not installed, so only {known} run here: pip install fp4export\n")
        sys.exit(3)
    run_exports()
