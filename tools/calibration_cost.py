"""Measure what calibration costs against depth, width and samples, and extrapolate: a section of docs/scaling.md.

`python -m tools.calibration_cost` calibrates small random PixArts and counts CPU seconds, which a busy machine disturbs
less than it does the clock. The second table is arithmetic from the models' shapes; `--arithmetic-only` writes it anew
and leaves the measured one. What one GPU takes at the sizes of real models is measured by
`python -m tools.calibration_cost_gpu`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import click

from exporter.calibration.calibrate import calibrate
from exporter.method_section import LearningCompute, MethodSection
from exporter.progress import NullProgress
from exporter.source import activation_bytes
from tools.gpu_bench.transformer import linear_plan
from tools.marked_section import markdown_table, markers, replace_section
from tools.random_calibration import random_blocks, random_run

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
SECTION = "calibration cost"
# Between the two tables.
_ARITHMETIC = "\n\nBy arithmetic:\n\n"

_SIDE, _CAPTIONS, _BATCH, _ITERATIONS = 16, 20, 16, 40
_TOKENS = (_SIDE // 2) ** 2
# Forward, the inputs' gradients and the weights'; a multiplication and an addition are two.
_OPERATIONS = 6
# A block of width d: four projections each in self- and cross-attention, and two of 4 d² in the feed-forward.
WEIGHTS = 16
# FP32 of an H100 SXM (67 published), at six tenths.
_RATE = 40e12
_COMPUTES: tuple[LearningCompute, ...] = ("fp32", "bf16")
# As published, and of `effort: default`.
_ITERATIONS_OF = (2500, 250)


@dataclass(frozen=True)
class Size:
    """Blocks, width, captured inputs."""

    depth: int
    width: int
    samples: int


SWEEP = (
    Size(2, 256, 128),
    Size(1, 256, 128),
    Size(4, 256, 128),
    Size(2, 128, 128),
    Size(2, 512, 128),
    Size(1, 1152, 32),
    Size(2, 256, 32),
    Size(2, 256, 512),
)


@dataclass(frozen=True)
class Job:
    """A calibration: blocks, a block's width and image tokens, samples in a batch, captured inputs; blocks whose output
    a later one takes too, and caption tokens."""

    name: str
    depth: int
    width: int
    tokens: int
    batch: int
    inputs: int
    skips: int = 0
    captions: int = 120

    def learning(self, iterations: int) -> float:
        """Operations of so many iterations on every block: linears but those of skips, and both products of
        self-attention."""
        block = _OPERATIONS * self.tokens * (WEIGHTS * self.width**2 + 2 * self.tokens * self.width)
        return float(iterations) * self.batch * self.depth * block

    @property
    def one_pass(self) -> float:
        """Operations of all inputs through every block, forward only."""
        return self.inputs * self.learning(1) / (self.batch * 3)

    def hours(self, iterations: int, processes: int) -> float:
        """Four passes, two before learning and two behind it, and learning are shared out; the two passes that capture
        inputs and balance them are made by the first process alone."""
        shared = self.learning(iterations) + 4 * self.one_pass
        return (shared / processes + 2 * self.one_pass) / _RATE / 3600

    @property
    def activations(self) -> int:
        """Bytes of all inputs' activations at the peak, as the exporter estimates them."""
        return self.inputs * activation_bytes(self.tokens * self.width, self.skips, self.captions * self.width)


JOBS = (
    Job("PixArt-α 512", 28, 1152, 1024, 16, 64 * 40),
    Job("PixArt-Σ 1024", 28, 1152, 4096, 16, 32 * 40, captions=300),
    Job("Hunyuan-DiT 1.2, 1024", 40, 1408, 4096, 8, 64 * 100, skips=19, captions=77 + 256),
    # As its recipes have it.
    Job("the same, each 4th step", 40, 1408, 4096, 8, 64 * 26, skips=19, captions=77 + 256),
    Job("12 B: 57 blocks of 3584, 1024", 57, 3584, 4096, 16, 32 * 40),
)


def cpu_seconds(size: Size, iterations: int, compute: LearningCompute = "fp32") -> float:
    """CPU seconds of a whole calibration."""
    model, run = random_blocks(size.depth, size.width // 64, 64, _SIDE), random_run(size.samples, _SIDE, _CAPTIONS)
    method = MethodSection(iterations=iterations, batch_size=_BATCH, scale_search="absmax", compute=compute)
    begin = time.process_time()
    calibrate(model, linear_plan(model), run, method, 0, NullProgress())
    return time.process_time() - begin


def measured_table() -> str:
    """CPU seconds of everything but learning, and of an iteration on a block."""
    head = (
        "blocks",
        "width",
        "inputs",
        "all but learning, CPU s",
        "an iteration on a block, CPU ms",
        "GFLOP per CPU s",
        "in BF16, CPU ms",
    )
    cpu_seconds(Size(1, 128, _BATCH), 2)
    rows = []
    for size in SWEEP:
        fixed = cpu_seconds(size, 1)
        iteration, in_bf16 = (
            (cpu_seconds(size, 1 + _ITERATIONS, compute) - fixed) / _ITERATIONS / size.depth for compute in _COMPUTES
        )
        work = _OPERATIONS * _BATCH * _TOKENS * (WEIGHTS * size.width**2 + 2 * _TOKENS * size.width)
        cells = (size.depth, size.width, size.samples, f"{fixed:.2f}", f"{1e3 * iteration:.1f}")
        rows.append((*map(str, cells), f"{work / iteration / 1e9:.0f}", f"{1e3 * in_bf16:.1f}"))
    return markdown_table(head, rows)


def extrapolated_table() -> str:
    """Operations, and the hours that they are at `_RATE`."""
    times = (f"{gpus}, {count} iterations" for count in _ITERATIONS_OF for gpus in ("one GPU", "eight"))
    head = ("model", "learning, 2500", "a pass", *times, "activations, one process", "of eight")
    rows = []
    for job in JOBS:
        work = (f"{job.learning(_ITERATIONS_OF[0]) / 1e15:.0f} PFLOP", f"{job.one_pass / 1e15:.1f} PFLOP")
        hours = (f"{job.hours(count, processes):.1f} h" for count in _ITERATIONS_OF for processes in (1, 8))
        sizes = (f"{job.activations / processes / 1e9:,.0f} GB" for processes in (1, 8))
        rows.append((job.name, *work, *hours, *sizes))
    return markdown_table(head, rows)


def kept_table(page: Path) -> str:
    """The measured table as it stands on the page. Raises `ClickException` where it has none."""
    _, _, section = page.read_text(encoding="utf-8").partition(markers(SECTION)[0])
    measured, found, _ = section.partition(_ARITHMETIC)
    if not found:
        raise click.ClickException(f"{page}: has no measured table yet; run without --arithmetic-only")
    return measured.strip()


@click.command(help=__doc__)
@click.option("--arithmetic-only", is_flag=True, help="Measure nothing: leave the first table as it stands.")
@click.option("--page", type=click.Path(path_type=Path), default=PAGE, help="Where it goes.")
def main(arithmetic_only: bool, page: Path) -> None:
    """Measure, unless that is not asked for, and write both tables."""
    measured = kept_table(page) if arithmetic_only else measured_table()
    replace_section(page, SECTION, f"{measured}{_ARITHMETIC}{extrapolated_table()}")


if __name__ == "__main__":
    main()
