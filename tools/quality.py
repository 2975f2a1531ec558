"""Compare rounding methods and formats at equal widths and several seeds: docs/quality.md.

`python -m tools.quality` measures cell after cell (a method at some bits, calibrated with a seed) and writes the page
from all measured ones, small files in docs/quality/, so it can be stopped and run again. Cells of other settings or
another model are measured anew; who changes what a method computes deletes its cells there, and build/quality.
Cells can be chosen: `--bits W4A6 --row ours --seed 0`. One takes half a minute to three minutes on one core,
`--samples 2000` eight more, or seconds with `--device cuda`. Processes may run side by side, each with seeds of its
own.
`--model shapes` measures the second model, which `python tools/train_shapes.py --output build/shapes` makes.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from rich.console import Console

from exporter.calibration.placement import choose_placement
from exporter.errors import EnvironmentLacksError
from exporter.files import write_text_atomically
from exporter.progress import RichProgress
from exporter.shards import Shard
from tools.marked_section import marked_sections
from tools.quality_cells.cells import Laboratory
from tools.quality_cells.chart import draw
from tools.quality_cells.page import markdown
from tools.quality_cells.rows import BITS, INTEGERS, OURS, ROWS, SEEDS

ROOT = Path(__file__).parents[1]
CELLS = ROOT / "docs" / "quality"
_RECIPES = {"digits": ROOT / "recipes" / "digits.yaml", "shapes": ROOT / "build" / "shapes" / "shapes.yaml"}


@click.command(help=__doc__)
@click.option("--model", type=click.Choice([*_RECIPES]), default="digits", show_default=True, help="Which model.")
@click.option("--bits", multiple=True, type=click.Choice([bits.name for bits in BITS]), help="Only these widths.")
@click.option("--row", "rows", multiple=True, type=click.Choice([row.key for row in ROWS]), help="Only these methods.")
@click.option("--seed", "seeds", multiple=True, type=click.Choice([*map(str, SEEDS)]), help="Only these seeds.")
@click.option("--page-only", is_flag=True, help="Measure nothing.")
@click.option("--samples", type=click.IntRange(0), default=0, show_default=True, help="Samples to judge.")
@click.option("--compare", is_flag=True, help="Only hold ours against integers, sample by sample.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where cells' samples are drawn.")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "quality.md", help="The page.")
def main(
    model: str,
    bits: tuple[str, ...],
    rows: tuple[str, ...],
    seeds: tuple[str, ...],
    page_only: bool,
    samples: int,
    compare: bool,
    device: str,
    output: Path,
) -> None:
    """Measure what is missing, then write the page."""
    if not _RECIPES[model].is_file():
        raise click.UsageError("--model shapes: make it first: python tools/train_shapes.py --output build/shapes")
    if compare and not samples:
        raise click.UsageError("--compare: of how many samples? Give --samples 2000")
    if samples and model != "digits":
        raise click.UsageError("--samples: only the digits have a classifier")
    # CPU seconds are those of one thread, which spends none of them waiting for another.
    torch.set_num_threads(1)
    laboratories = _laboratories(device)
    chosen = [
        (row, width)
        for width in BITS
        for row in ROWS
        if width.name in (bits or (width.name,)) and row.key in (rows or (row.key,)) and width in row.at
    ]
    for seed in () if page_only else map(int, seeds or SEEDS):
        for row, width in chosen:
            if not compare:
                laboratories[model].cell(row, width, seed, samples)
            elif row is OURS:
                laboratories[model].compared(row, INTEGERS, width, seed, samples)
    draw(laboratories["digits"], output.with_suffix(".svg"))
    if samples:
        laboratories[model].original_judged(samples)
    sections = marked_sections(output) if output.is_file() else []
    page = markdown(laboratories["digits"], laboratories["shapes"]).rstrip()
    write_text_atomically(output, "\n\n".join([page, *sections]) + "\n")


def _laboratories(device: str) -> dict[str, Laboratory]:
    """By model. Raises `UsageError` for a device that is not here."""
    try:
        placement = choose_placement(device, None, Shard())
    except EnvironmentLacksError as error:
        raise click.UsageError(str(error)) from error
    progress, made = RichProgress(Console(stderr=True)), {}
    for name, recipe in _RECIPES.items():
        folder = ROOT / "build" / "quality" / name
        folder.mkdir(parents=True, exist_ok=True)
        made[name] = Laboratory(recipe, folder, CELLS / name, progress, placement)
    return made


if __name__ == "__main__":
    main()
