"""Measure the kernels on this machine's GPU and write the GPU section of docs/benchmarks.md.

`python -m tools.bench_gpu` needs an NVIDIA GPU that kernels are made for, torch with CUDA, and Triton. Kernels are
compiled on first use (minutes) and kept. Every tactic of every operator is checked against its reference; linears,
quantizers and PixArt-α's whole transformer are timed; nothing wrong is written. `--check` only checks,
at small odd shapes; `--sanitize` does that under compute-sanitizer.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import click
import torch
from rich.console import Console

from exporter.cuda.launcher import Launcher, launcher_of
from exporter.errors import EnvironmentLacksError, FidelityError, Fp4ExportError
from exporter.progress import Progress, RichProgress
from plugins.kernels.hardware import HARDWARE
from tools.cpu_bench.model import BLOCKS
from tools.gpu_bench.cases import FEW, MANY, SCHEMES, SHAPES, Case, WrongResultError
from tools.gpu_bench.linears import check_tactics, measure_linear
from tools.gpu_bench.machine import machine
from tools.gpu_bench.page import Results, StepRow, section
from tools.gpu_bench.quantizers import measure_quantizer
from tools.gpu_bench.timing import Clock
from tools.gpu_bench.transformer import measure_transformer
from tools.marked_section import replace_section

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
SECTION = "gpu"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
_ODD_SHAPES = ((1, 200, 256), (37, 136, 384), (131, 72, 128))
"""Tokens, N and K that no tile divides."""
_QUANTIZED = (1152, 1408, 4608)


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(3), default=50, show_default=True, help="Rounds of timing.")
@click.option(
    "--blocks", type=click.IntRange(1, BLOCKS), default=BLOCKS, show_default=True, help="Blocks of the transformer."
)
@click.option("--check", is_flag=True, help="Check every tactic at small odd shapes; time and write nothing.")
@click.option("--sanitize", is_flag=True, help="Print and run --check under each of compute-sanitizer's tools.")
def main(rounds: int, blocks: int, check: bool, sanitize: bool) -> None:
    """Measure and write, or check."""
    progress = RichProgress(Console(stderr=True))
    try:
        if sanitize:
            run_sanitizers()
            return
        launcher = open_gpu()
        if check:
            check_all(launcher, progress)
            return
        for results in measure(launcher, rounds, blocks, progress):
            replace_section(PAGE, SECTION, section(results))
    except WrongResultError as error:
        fail(FidelityError(f"{error}; what was measured since is not written"))
    except Fp4ExportError as error:
        fail(error)


def fail(error: Fp4ExportError) -> NoReturn:
    """One line and the error's exit code."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def open_gpu() -> Launcher:
    """The first GPU. Raises `EnvironmentLacksError` without one that torch sees and kernels are made for."""
    if not torch.cuda.is_available():
        raise EnvironmentLacksError("no GPU that this PyTorch can use; run this on a machine with an NVIDIA GPU")
    capability = torch.cuda.get_device_capability(0)
    if capability not in HARDWARE:
        known = ", ".join("{}.{}".format(*entry) for entry in HARDWARE)
        raise EnvironmentLacksError(
            "no kernels for compute capability {}.{}; there are for: {}".format(*capability, known)
        )
    return launcher_of(0)


def check_all(launcher: Launcher, progress: Progress) -> None:
    """Every tactic of both schemes at odd shapes. Raises `WrongResultError`."""
    cases = [(scheme, *shape) for scheme in SCHEMES for shape in _ODD_SHAPES]
    with progress.task("checking", len(cases)) as task:
        for scheme, rows, n, k in cases:
            check_tactics(_case(launcher, scheme, rows, n, k), launcher)
            task.advance()
    torch.cuda.synchronize()
    print(f"{len(cases)} cases, all tactics: as the reference")


def measure(launcher: Launcher, rounds: int, blocks: int, progress: Progress) -> Iterator[Results]:
    """What the section shows, as far as it is measured: first without the transformer, which takes longest."""
    clock = Clock(torch.device("cuda"), rounds)
    shapes = [(scheme, rows, *shape) for scheme in SCHEMES for rows in (*MANY, *FEW) for shape in SHAPES]
    linears = []
    with progress.task("linears", len(shapes)) as task, torch.inference_mode():
        for scheme, rows, n, k in shapes:
            linears.append(measure_linear(_case(launcher, scheme, rows, n, k), launcher, clock))
            task.advance()
    with torch.inference_mode():
        quantizers = [
            measure_quantizer(rows, k, name, launcher, clock)
            for name in SCHEMES.values()
            for rows in MANY
            for k in _QUANTIZED
        ]
    arguments = "" if blocks == BLOCKS else f" --blocks {blocks}"
    results = Results(
        f"python -m tools.bench_gpu{arguments}", machine(), rounds, clock.least(), linears, quantizers, blocks=blocks
    )
    yield results
    steps: list[StepRow] = []
    for step in measure_transformer(blocks, clock, progress):
        steps.append(step)
        yield replace(results, steps=steps)


def sanitizer_commands() -> list[list[str]]:
    """One command per tool of compute-sanitizer."""
    return [
        [
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "1",
            sys.executable,
            "-m",
            "tools.bench_gpu",
            "--check",
        ]
        for tool in SANITIZERS
    ]


def run_sanitizers() -> None:
    """Print and run the commands. Raises `EnvironmentLacksError` without the tool, `FidelityError` if one finds
    something."""
    commands = sanitizer_commands()
    for command in commands:
        print(" ".join(command), flush=True)
    if shutil.which("compute-sanitizer") is None:
        raise EnvironmentLacksError("compute-sanitizer is not here; it comes with the CUDA toolkit")
    for tool, command in zip(SANITIZERS, commands, strict=True):
        if subprocess.run(command, check=False).returncode:
            raise FidelityError(f"compute-sanitizer's {tool} found something; see above")


def _case(launcher: Launcher, scheme: str, rows: int, n: int, k: int) -> Case:
    return Case.random(scheme, rows, n, k, capability=launcher.capability, device=torch.device("cuda"))


if __name__ == "__main__":
    main()
