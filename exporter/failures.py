"""What the command says, and which code it ends with, when something goes wrong."""

from __future__ import annotations

import sys
import traceback

from exporter.errors import EnvironmentLacksError, Fp4ExportError, InputError

EXIT_INTERNAL = 1
EXIT_INTERRUPTED = 130


def describe_failure(error: Exception) -> tuple[str, int]:
    """The message and exit code for whatever ended a command; what nothing explains is a defect of fp4export."""
    if isinstance(error, Fp4ExportError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}", InputError.exit_code
    if isinstance(error, ImportError):
        return f"a package is missing: {error}", EnvironmentLacksError.exit_code
    if isinstance(error, MemoryError):
        return "this machine has too little memory", EnvironmentLacksError.exit_code
    return f"internal: {type(error).__name__}: {error}; please report it with what --debug prints", EXIT_INTERNAL


def fail(message: str, code: int, *, debug: bool) -> int:
    """Print the message as one line, behind the traceback if `debug`; returns `code`."""
    if debug:
        traceback.print_exc()
    sys.stderr.write("error: " + " ".join(line.strip() for line in message.splitlines()) + "\n")
    return code
