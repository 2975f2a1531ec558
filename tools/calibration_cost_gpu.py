"""Measure on a GPU what calibrating a block of real models' sizes costs: a section of docs/scaling.md.

`python -m tools.calibration_cost_gpu` needs an NVIDIA GPU that torch sees. It calibrates PixArts of one random block,
as `effort: default` does, with few iterations and few captured inputs; hours of whole models are extrapolated to
all their blocks, iterations and inputs. `--precision` also says what products in TF32 would change.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path

import click
import torch
from rich.console import Console
from torch import nn

from exporter.calibration.activations import ActivationStore
from exporter.calibration.calibrate import calibrate
from exporter.calibration.placement import CPU, Placement
from exporter.method_section import MethodSection
from exporter.progress import NullProgress, Progress, RichProgress
from tools.calibration_cost import JOBS, WEIGHTS, Job
from tools.gpu_bench.machine import machine
from tools.gpu_bench.transformer import linear_plan
from tools.marked_section import markdown_table, replace_section
from tools.random_calibration import random_blocks, random_run

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
SECTION = "calibration cost on a gpu"

_CAPTIONS = 120
_DEFAULT_ITERATIONS, _PUBLISHED_ITERATIONS = 250, 2500
_COMPARED_ITERATIONS = 60
# Passes through the block, counted low: the fifth may be half of one.
_LEAST_PASSES, _PASSES_OF_ITERATION = 4, 3


@dataclass(frozen=True)
class Block:
    """A block of a job's model and its heads; how many inputs and iterations are measured; what to say of it."""

    job: Job
    heads: int
    measured_inputs: int
    iterations: int
    note: str = ""

    @property
    def model(self) -> str:
        """The model's name, with the note."""
        return self.job.name + self.note

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.job.width // self.heads

    @property
    def side(self) -> int:
        """Image tokens along a side."""
        return isqrt(self.job.tokens)

    @property
    def weight_bytes(self) -> int:
        """Of the block's linears, in float32."""
        return 4 * WEIGHTS * self.job.width**2

    def store(self, placement: Placement) -> ActivationStore:
        """Where the whole model's calibration keeps them, if it is not in files."""
        on_gpu = placement.keeps(self.job.activations, self.weight_bytes)
        return ActivationStore(device=placement.device if on_gpu else CPU)

    @property
    def iteration_flop(self) -> float:
        """Operations of an iteration's linears and products of self-attention, forward and backward."""
        return self.job.learning(1) / self.job.depth


_JOB = {job.name: job for job in JOBS}
BLOCKS = (
    Block(_JOB["PixArt-α 512"], 16, 256, 100),
    Block(_JOB["PixArt-Σ 1024"], 16, 96, 20),
    Block(_JOB["Hunyuan-DiT 1.2, 1024"], 16, 96, 20, " (its width in PixArt's block)"),
    Block(_JOB["12 B: 57 blocks of 3584, 1024"], 28, 32, 4),
)


@dataclass(frozen=True)
class Calibrated:
    """Seconds and peak gigabytes on the GPU of a calibration, and the block's relative error before and behind it."""

    seconds: float
    gigabytes: float
    start: float
    end: float


@dataclass(frozen=True)
class Cost:
    """Seconds of an iteration, of everything else per captured input, and of everything else that inputs do not make
    longer, all for one block; the calibration that they are from, and whether activations were on the GPU."""

    block: Block
    iteration: float
    per_input: float
    fixed: float
    calibrated: Calibrated
    on_gpu: bool

    @property
    def resolved(self) -> bool:
        """Whether the time per input can be: an input goes through the block five times, an iteration's share of it
        is about three of these. A difference of two calibrations that is below has drowned in what varies."""
        return self.per_input >= _LEAST_PASSES * self.iteration / (_PASSES_OF_ITERATION * self.block.job.batch)

    def hours(self, iterations: int) -> float | None:
        """Of the whole model, without the sampler's trajectories; None if the time per input is not known."""
        if not self.resolved:
            return None
        block = self.block
        seconds = iterations * self.iteration + block.job.inputs * self.per_input + self.fixed
        return block.job.depth * seconds / 3600


def random_model(block: Block) -> nn.Module:
    """A PixArt of one block."""
    return random_blocks(1, block.heads, block.head, 2 * block.side)


def calibrated(model: nn.Module, block: Block, placement: Placement, inputs: int, iterations: int) -> Calibrated:
    """One calibration on `inputs` random inputs."""
    run = replace(
        random_run(inputs, 2 * block.side, _CAPTIONS),
        placement=placement,
        limit=placement.limit(),
        store=block.store(placement),
    )
    method = MethodSection(effort="default", iterations=iterations, batch_size=block.job.batch)
    torch.cuda.reset_peak_memory_stats(placement.device)
    begin = time.perf_counter()
    result = calibrate(model, linear_plan(model), run, method, 0, NullProgress())
    torch.cuda.synchronize(placement.device)
    seconds = time.perf_counter() - begin
    [learned] = result.blocks
    peak = torch.cuda.max_memory_allocated(placement.device) / 1e9
    return Calibrated(seconds, peak, learned.error_start, learned.error_calibrated)


def warm_up(block: Block, placement: Placement) -> None:
    """Let libraries load and choose what they compute with."""
    with placement.computing():
        calibrated(random_model(block), block, placement, block.job.batch, 1)


def cost(block: Block, placement: Placement) -> Cost:
    """What the block's calibration takes, from three calibrations, behind one that warms up for sizes like these."""
    model, half_inputs = random_model(block), block.measured_inputs // 2
    with placement.computing():
        calibrated(model, block, placement, block.measured_inputs, 1)
        half = calibrated(model, block, placement, half_inputs, 1)
        whole = calibrated(model, block, placement, block.measured_inputs, 1)
        learned = calibrated(model, block, placement, block.measured_inputs, 1 + block.iterations)
    per_input = (whole.seconds - half.seconds) / (block.measured_inputs - half_inputs)
    iteration = (learned.seconds - whole.seconds) / block.iterations
    fixed = max(0.0, whole.seconds - block.measured_inputs * per_input - iteration)
    return Cost(block, iteration, per_input, fixed, learned, block.store(placement).device != CPU)


def section(costs: Sequence[Cost], compared: Sequence[tuple[str, Calibrated]]) -> str:
    """The section's text."""
    head = (
        "model", "width", "tokens", "batch", "an iteration on a block", "TFLOP/s", "all else: per input",
        "and per block", "GPU memory", "activations of the whole",
        f"whole, {_DEFAULT_ITERATIONS} iterations", f"{_PUBLISHED_ITERATIONS}",
    )  # fmt: skip
    rows = [
        (
            item.block.model, str(item.block.job.width), str(item.block.job.tokens), str(item.block.job.batch),
            f"{1e3 * item.iteration:.1f} ms", f"{item.block.iteration_flop / item.iteration / 1e12:.0f}",
            f"{1e3 * item.per_input:.1f} ms" if item.resolved else "not resolved",
            f"{item.fixed:.1f} s", f"{item.calibrated.gigabytes:.1f} GB",
            f"{item.block.job.activations / 1e9:,.0f} GB {'on the GPU' if item.on_gpu else 'elsewhere'}",
            _hours(item, _DEFAULT_ITERATIONS), _hours(item, _PUBLISHED_ITERATIONS),
        )
        for item in costs
    ]  # fmt: skip
    parts = [f"Written by `python -m tools.calibration_cost_gpu`. {machine()}.", markdown_table(head, rows)]
    if compared:
        lines = [(name, f"{c.seconds:.2f} s", f"{c.start:.3e}", f"{c.end:.3e}") for name, c in compared]
        parts += [
            "Products of float32 numbers:",
            markdown_table(("", "calibration", "error before", "and behind it"), lines),
        ]
    return "\n\n".join(parts)


def _hours(item: Cost, iterations: int) -> str:
    hours = item.hours(iterations)
    return "–" if hours is None else f"{hours:.2f} h"


@contextmanager
def _products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compare(block: Block, placement: Placement) -> list[tuple[str, Calibrated]]:
    """The same calibration with products in FP32 and in TF32, each behind a short one that warms up."""
    model, found = random_model(block), []
    with placement.computing():
        for name, precision in (("FP32", "highest"), ("TF32", "high")):
            with _products(precision):
                calibrated(model, block, placement, block.job.batch, 1)
                found.append(
                    (
                        f"{block.model}, {name}",
                        calibrated(model, block, placement, block.measured_inputs, _COMPARED_ITERATIONS),
                    )
                )
    return found


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="The first block only, with few iterations; print, and write nothing.")
@click.option("--precision", is_flag=True, help="Compare products in FP32 and TF32, too.")
def main(quick: bool, precision: bool) -> None:
    """Measure and write."""
    if not torch.cuda.is_available():
        print("error: no GPU that this PyTorch can use; run this on a machine with an NVIDIA GPU", file=sys.stderr)
        sys.exit(3)
    placement = Placement(torch.device("cuda", 0), torch.cuda.mem_get_info(0)[0])
    progress: Progress = RichProgress(Console(stderr=True))
    blocks = [replace(BLOCKS[0], measured_inputs=16, iterations=4)] if quick else BLOCKS
    warm_up(blocks[0], placement)
    compared = compare(blocks[0], placement) if precision else []
    costs: list[Cost] = []
    with progress.task("blocks", len(blocks)) as task:
        for block in blocks:
            costs.append(cost(block, placement))
            # What has been measured stays, whatever becomes of larger blocks.
            text = section(costs, compared)
            if not quick:
                replace_section(PAGE, SECTION, text)
            task.advance()
    if quick:
        print(text)


if __name__ == "__main__":
    main()
