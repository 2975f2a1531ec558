"""Export models of full size on this machine and write what it takes, stage by stage, into docs/benchmarks.md.

`python -m tools.full_size --model pixart` makes a model directory with random weights in build/full_size, exports it by
a round-to-nearest W4A6 recipe for the cpu and for rtx-sm89, there with either storage of weights, each from scratch in
a process of its own, and measures the resident memory of that process and all that it starts. What an export that is
broken off has taken so far is in TARGET.spans.json. `--blocks 4` is quick, and is printed instead of written. Close
everything else: a busy machine takes longer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import psutil

from exporter.onnx_files import total_bytes
from exporter.targets import get_target
from tools.full_size_models import MODELS, TRANSFORMER, FullSize
from tools.marked_section import replace_section
from tools.this_machine import GB, machine

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
_SECONDS_BETWEEN_SAMPLES = 0.1
_MOST_OF_FP32 = 0.17
_PACKED = "-packed"
_BUILDER = (
    "TensorRT-RTX's own builder, in a process of its own, takes one core and at most {:.1f} GB of what is resident. "
    "Where memory is for both it runs beside `validate`, at lower priority, and `build` is what was left of it."
)
# The stage that writes the output; what comes behind it evaluates it for the report.
_WRITES = "build"
# Stages that are named where a budget is missed.
_NAMED = 3


@dataclass(frozen=True)
class StageUse:
    """One stage of an export: its wall time, and the most resident memory that was seen during it."""

    name: str
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class ExportUse:
    """One export from scratch. `seconds` and `peak_bytes` are those of the whole process, its start included;
    `written_seconds` those until the output stood, validated, and only the report's evaluation was left.
    `builder_bytes` is the most resident memory of the processes that it started: TensorRT's builder, if any. `runs` are
    the `written_seconds` of all exports that this one is the fastest of."""

    target: str
    seconds: float
    written_seconds: float
    peak_bytes: int
    output_bytes: int
    builder_bytes: int
    stages: tuple[StageUse, ...]
    runs: tuple[float, ...] = ()


@click.command(help=__doc__)
@click.option("--model", "name", type=click.Choice(list(MODELS)), required=True, help="The published model's shape.")
@click.option("--blocks", type=click.IntRange(1), help="Transformer blocks, instead of the published number.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("cpu", "rtx-sm89", "rtx-sm89-packed"),
    show_default=True,
    help="A target; with -packed behind it: with `storage: packed`.",
)
@click.option(
    "--runs", type=click.IntRange(1), default=1, show_default=True, help="Exports of which the fastest is shown."
)
def main(name: str, blocks: int | None, targets: tuple[str, ...], runs: int) -> None:
    """Make the model, export it, and write or print the section."""
    model = MODELS[name]
    folder = made_folder(name, blocks or model.blocks)
    uses = [[measured_export(folder, target) for target in targets] for _ in range(runs)]
    fastest = [fastest_of(list(of_target)) for of_target in zip(*uses, strict=True)]
    section = markdown(model, weight_bytes(folder), fastest)
    if blocks is None:
        replace_section(PAGE, f"full size: {name}", section)
    else:
        click.echo(section)


def fastest_of(uses: Sequence[ExportUse]) -> ExportUse:
    """The export whose output stood first, with the times of all, and the most memory of any."""
    fastest = min(uses, key=lambda use: use.written_seconds)
    times = tuple(sorted(use.written_seconds for use in uses))
    return replace(fastest, runs=times, peak_bytes=max(use.peak_bytes for use in uses))


def made_folder(name: str, blocks: int) -> Path:
    """The folder of this model with so many blocks and of its exports, made unless it is there."""
    folder = ROOT / "build" / "full_size" / f"{name}-{blocks}"
    making = [sys.executable, "-m", "tools.full_size_models", name, str(blocks), str(folder)]
    subprocess.run(making, check=True)
    return folder


def weight_bytes(folder: Path) -> int:
    """The size of the transformer's weights."""
    return sum(file.stat().st_size for file in (folder / TRANSFORMER).glob("*.safetensors"))


def measured_export(folder: Path, target: str) -> ExportUse:
    """Export `folder`/recipe.yaml for `target` (as `--target` has it) in a process of its own, and watch it."""
    output = folder / (f"{target}.onnx" if target == "cpu" else f"{target}.plan")
    spans_file = folder / f"{target}.spans.json"
    overrides = ["storage=packed"] if target.endswith(_PACKED) else []
    files = [str(folder / "recipe.yaml"), str(output), target.removesuffix(_PACKED), str(spans_file)]
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "tools.measured_export", *files, *overrides])
    samples = watch(process)
    seconds = time.monotonic() - start
    if process.returncode:
        raise click.ClickException(f"the export for {target} ended with exit code {process.returncode}")
    spans = json.loads(spans_file.read_text(encoding="utf-8"))
    stages = tuple(
        StageUse(name, end - begin, max((size for when, size, _ in samples if begin <= when <= end), default=0))
        for name, begin, end in spans
    )
    size = total_bytes(output) if output.suffix == ".onnx" else output.stat().st_size
    written = next(end for name, _, end in spans if name == _WRITES) - start
    peak, builder = max(whole for _, whole, _ in samples), max(below for _, _, below in samples)
    return ExportUse(target, seconds, written, peak, size, builder, stages)


def watch(process: subprocess.Popen[bytes]) -> list[tuple[float, int, int]]:
    """(time.monotonic, resident bytes of the process and its descendants, of these alone), until the process ends."""
    samples = []
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        below = _resident(lambda: parent.children(recursive=True))
        samples.append((time.monotonic(), _resident(lambda: [parent]) + below, below))
        time.sleep(_SECONDS_BETWEEN_SAMPLES)
    return samples


def _resident(processes: Callable[[], Iterable[psutil.Process]]) -> int:
    total = 0
    try:
        for process in processes():
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        # One of them has just ended; the next sample does without it.
        pass
    return total


def markdown(model: FullSize, weights: int, exports: Sequence[ExportUse]) -> str:
    """The section about one model: a line per stage, two columns per target, and what was aimed at."""
    lines = [
        f"### {model.title}",
        "",
        f"Random weights in FP32 ({weights / GB:.2f} GB), {model.recipe_in_words}; W4A6 rounded to nearest on absmax "
        "scales, one step of one trajectory captured, on which the whole gate runs. Machine: "
        f"{machine()}. Seconds, and the most resident memory over the FP32 weights' size, "
        "files that are mapped into memory included.",
        "",
        "| stage | " + " | ".join(f"{use.target}, s | peak" for use in exports) + " |",
        "|---|" + "---|---|" * len(exports),
    ]
    for index, stage in enumerate(exports[0].stages):
        cells = [_cells(use.stages[index].seconds, use.stages[index].peak_bytes, weights) for use in exports]
        lines.append(f"| {stage.name} | " + " | ".join(cells) + " |")
    total = [f"**{use.seconds:.1f}** | **{use.peak_bytes / weights:.2f}**" for use in exports]
    lines.append("| **all** | " + " | ".join(total) + " |")
    lines += ["", "| aim | measured | |", "|---|---|---|"]
    for use in exports:
        peak, size = use.peak_bytes / GB, use.output_bytes / weights
        lines += [
            f"| {use.target}: {what} in at most {model.most_seconds} s | {seconds:.0f} s "
            f"| {_verdict(seconds, model.most_seconds, '.0f', ' s', _longest(stages))} |"
            for what, seconds, stages in (
                ("output written and validated", use.written_seconds, _until_written(use)),
                ("output, evaluation and report", use.seconds, use.stages),
            )
        ]
        lines += [
            f"| {use.target}: at most {model.most_bytes / GB:.1f} GB resident | {peak:.1f} GB "
            f"| {_verdict(peak, model.most_bytes / GB, '.1f', ' GB', _fullest(use))} |",
            f"| {use.target}: file at most {_MOST_OF_FP32} of FP32 | {size:.3f} "
            f"| {_verdict(size, _MOST_OF_FP32, '.3f', '', _why_large(use.target))} |",
        ]
    lines += [line for use in exports for note in _notes(use) for line in ("", note)]
    return "\n".join(lines)


def _notes(use: ExportUse) -> Iterator[str]:
    if len(use.runs) > 1:
        times = ", ".join(f"{seconds:.0f}" for seconds in use.runs)
        yield f"{use.target}: the fastest of {len(use.runs)} exports ({times} s), with the most memory of any."
    if get_target(use.target.removesuffix(_PACKED)).engine == "tensorrt-rtx":
        yield f"{use.target}: " + _BUILDER.format(use.builder_bytes / GB)


def _verdict(found: float, most: float, digits: str, unit: str, why_not: str) -> str:
    return "met" if found <= most else f"**missed** by {found - most:{digits}}{unit}: {why_not}"


def _until_written(use: ExportUse) -> Sequence[StageUse]:
    names = [stage.name for stage in use.stages]
    return use.stages[: names.index(_WRITES) + 1]


def _longest(stages: Sequence[StageUse]) -> str:
    named = sorted(stages, key=lambda stage: -stage.seconds)[:_NAMED]
    return "the longest are " + ", ".join(f"{stage.name} ({stage.seconds:.0f} s)" for stage in named)


def _fullest(use: ExportUse) -> str:
    stages = sorted(use.stages, key=lambda stage: -stage.peak_bytes)[:_NAMED]
    return "most in " + ", ".join(f"{stage.name} ({stage.peak_bytes / GB:.1f} GB)" for stage in stages)


def _why_large(target: str) -> str:
    if target.endswith(_PACKED) or get_target(target).engine == "onnxruntime":
        return "what stays in high precision is FP32"
    return "weights in their 8-bit container, the default, are a quarter of FP32; see rtx-sm89-packed"


def _cells(seconds: float, peak: int, weights: int) -> str:
    return f"{seconds:.1f} | {peak / weights:.2f}" if peak else f"{seconds:.1f} | –"


if __name__ == "__main__":
    main()
