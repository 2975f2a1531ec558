"""Try the quantizers' quotient exhaustively: every significand of a scale, all midpoints of all grids, the nearest x.

The kernels divide by two operations, x·r + x·r' (`plugins.kernels.device_rounding.quotient`). A quantizer sees of a
quotient only on which side of a midpoint it lies, so `python -m tools.quotient_check` counts where that is another
side than the division's: 2^23 scales × 128 midpoints × the five float32 next to scale·midpoint, 5.4·10⁹ quotients in C
(quotient_check.c, compiled here by gcc or clang; seconds on a few cores). Midpoints are halves up to 127.5; powers of
two change nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click

SOURCE = Path(__file__).with_suffix(".c")
SIGNIFICANDS = 2**23
_PIECE = 2**16


class CompilerMissingError(RuntimeError):
    """There is no C compiler on this machine."""


@dataclass(frozen=True)
class Count:
    """How many quotients were tried, and how many of them lie on another side of the midpoint than the division's."""

    tried: int
    differing: int


def count(first: int, last: int, *, alone: bool = False) -> Count:
    """Scales 1 + s·2^-23 for first ≤ s < last; `alone`: with the reciprocal alone, for comparison.

    Raises CompilerMissingError.
    """
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CompilerMissingError("neither gcc nor clang is here; install one")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "quotient_check"
        command = [compiler, "-O3", "-march=native", "-ffp-contract=off", "-o", str(program), str(SOURCE), "-lm"]
        subprocess.run(command, check=True)

        def run(start: int) -> Count:
            arguments = [str(start), str(min(start + _PIECE, last)), str(int(alone))]
            answer = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
            return Count(*map(int, answer.stdout.split()))

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            counts = list(threads.map(run, range(first, last, _PIECE)))
    return Count(sum(entry.tried for entry in counts), sum(entry.differing for entry in counts))


@click.command(help=__doc__)
@click.option("--significands", type=click.IntRange(1, SIGNIFICANDS), default=SIGNIFICANDS, show_default=True)
def main(significands: int) -> None:
    """Count, print, and exit with 1 if any quotient differs."""
    try:
        found = count(0, significands)
    except CompilerMissingError as error:
        raise click.ClickException(str(error)) from error
    print(f"{found.tried:,} quotients, {found.differing:,} differ from the division's")
    sys.exit(found.differing > 0)


if __name__ == "__main__":
    main()
