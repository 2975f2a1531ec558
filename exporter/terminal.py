"""What the commands share: options, consoles, progress."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from exporter.progress import Progress

# Tables keep their columns when the output is piped to a file or a pager.
_PIPED_WIDTH = 160


class FiniteRange(click.FloatRange):
    """A range of floats without NaN, which compares as inside of every range, and without infinities."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number that `value` says. Raises `click.BadParameter`."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no finite number.", param, ctx)
        return number


GUIDANCE = click.option("--guidance", type=FiniteRange(0), metavar="X", help="Classifier-free guidance; 1 is none.")
QUIET = click.option("--quiet", is_flag=True, help="Print nothing but errors.")
DEBUG = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
OUTPUT = click.option(
    "-o",
    "--output",
    required=True,
    metavar="OUT",
    help="The engine: NAME.onnx, NAME.plan, NAME.engine; or NAME.bundle.",
)
WORK_DIR = click.option(
    "--work-dir", metavar="DIR", help="Where finished stages are kept (default: NAME.work beside OUT)."
)
RESUME = click.option(
    "--resume/--fresh",
    default=True,
    help="Go on from what the work folder holds of this recipe (the default), or run every stage again and throw away "
    "what interrupted calibrations left in it.",
)


def open_console(*, stderr: bool) -> Console:
    """The terminal, or a pipe with room for tables."""
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_PIPED_WIDTH)


def open_progress(*, quiet: bool) -> Progress:
    """Progress on the error stream, or none."""
    from exporter.progress import NullProgress, RichProgress

    return NullProgress() if quiet else RichProgress(open_console(stderr=True))
