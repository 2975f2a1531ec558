"""Measure PixArt-α's transformer on this machine's CPU and write docs/benchmarks.md with its picture.

`python -m tools.bench` takes about half an hour on two cores, 20 GB of memory and 10 GB of disk in build/bench, whose
graphs a second run uses again; `--blocks 2` is quick. Close everything else: times are compared side by side, but a
busy machine blurs them.
"""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from exporter.files import write_text_atomically
from exporter.onnx_files import total_bytes
from exporter.progress import Progress, RichProgress
from tools.cpu_bench.digits import measure_digits
from tools.cpu_bench.graphs import FP32, FP32_FUSED, VARIANTS, make_graphs
from tools.cpu_bench.measure import (
    gemm_seconds,
    memory_of,
    product_shapes,
    profile,
    side_by_side,
    snr_db,
)
from tools.cpu_bench.model import BLOCKS, CAPTION_TOKENS, random_pixart
from tools.cpu_bench.page import PICTURE, Page, Result, draw, markdown
from tools.marked_section import marked_sections

ROOT = Path(__file__).parents[1]
_BATCH, _TOKENS = 2, 1024


@click.command(help=__doc__)
@click.option("--blocks", type=click.IntRange(1, BLOCKS), default=BLOCKS, show_default=True, help="Transformer blocks.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Rounds of timing.")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs", help="Folder of benchmarks.md.")
def main(blocks: int, rounds: int, output: Path) -> None:
    """Measure and write the page."""
    progress = RichProgress(Console(stderr=True))
    folder = ROOT / "build" / "bench" / str(blocks)
    folder.mkdir(parents=True, exist_ok=True)
    page = measure(blocks, rounds, folder, progress)
    output.mkdir(parents=True, exist_ok=True)
    draw(page, output / PICTURE)
    file = output / "benchmarks.md"
    others = marked_sections(file) if file.is_file() else []
    write_text_atomically(file, "\n\n".join([markdown(page).rstrip(), *others]) + "\n")


def measure(blocks: int, rounds: int, folder: Path, progress: Progress) -> Page:
    """Everything that the page shows."""
    paths = make_graphs(lambda: random_pixart(blocks), folder, progress)
    digits = measure_digits(folder, progress)
    memories = {}
    with progress.task("memory", len(paths)) as task:
        for name, path in paths.items():
            memories[name] = memory_of(path)
            task.advance()
    seconds, outputs = side_by_side(paths, rounds, progress)
    results = [
        Result(
            name,
            seconds[name],
            total_bytes(path),
            memories[name],
            None if name == FP32 else snr_db(outputs[FP32], outputs[name]),
        )
        for name, path in paths.items()
    ]
    profiled = (FP32, FP32_FUSED, *list(VARIANTS)[:2])
    shapes = product_shapes(paths[profiled[-1]], _BATCH * _TOKENS, _BATCH * CAPTION_TOKENS)
    return Page(
        blocks, rounds, results, {name: profile(paths[name], folder) for name in profiled}, gemm_seconds(shapes), digits
    )


if __name__ == "__main__":
    main()
