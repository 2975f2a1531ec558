"""docs/quality.md out of the cells that have been measured."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tools.quality_cells.figures import Interval
from tools.quality_cells.rows import BITS, ITERATIONS, ROWS, SEEDS, Bits, Row
from tools.quality_cells.verdict import (
    NOTHING,
    against_best,
    by_method,
    features_against_integers,
    samples_against_integers,
    spread,
)

if TYPE_CHECKING:
    from tools.quality_cells.cells import Figures, Laboratory

_HEADING = (
    "| method | noise-prediction SNR, dB | worst step | drift, dB | recognised | Fréchet distance | CPU s "
    "| seeds (judged) |\n"
    "|---|---|---|---|---|---|---|---|"
)


def markdown(digits: Laboratory, shapes: Laboratory) -> str:
    """The page, but for the sections of other tools."""
    environment = Environment(  # noqa: S701 - Markdown, not HTML
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("quality.md.jinja")
    return template.render(
        digits=[(bits, table(digits, bits)) for bits in BITS],
        shapes=[(bits, table(shapes, bits)) for bits in BITS],
        digits_by_method=by_method(digits),
        digits_against_best=against_best(digits),
        samples_against_integers=samples_against_integers(digits),
        features_against_integers=features_against_integers(digits),
        shapes_by_method=by_method(shapes),
        shapes_against_best=against_best(shapes),
        original=_original(digits),
        original_distance=_original_distance(digits),
        drawn=_drawn(digits),
        provenance=_provenance([digits, shapes]),
        nothing=NOTHING,
        iterations=ITERATIONS,
        seeds=", ".join(map(str, SEEDS)),
    )


def table(laboratory: Laboratory, bits: Bits) -> str:
    """Every method at these bits that has been measured."""
    lines = [line for row in ROWS if (line := _line(row, laboratory.all_kept(row, bits)))]
    return "\n".join([_HEADING, *lines]) if lines else NOTHING


def _line(row: Row, found: Sequence[Figures]) -> str:
    if not found:
        return ""
    judged = [figures for figures in found if figures.samples]
    cells = [
        row.title,
        spread([figures.snr_mean_db for figures in found]),
        spread([figures.snr_worst_db for figures in found]),
        spread([figures.drift_db for figures in found]),
        _intervals([figures.recognised for figures in judged], 100, " %"),
        _intervals([figures.frechet for figures in judged], 1, ""),
        f"{statistics.mean(figures.calibration_seconds for figures in found):.0f}",
        f"{len(found)} ({len(judged)})",
    ]
    return f"| {' | '.join(cells)} |"


def _original(laboratory: Laboratory) -> str:
    found = laboratory.original_judged(0)
    if found is None:
        return "not measured yet"
    recognised, frechet = found
    return f"recognised {_intervals([recognised], 100, ' %')}, Fréchet distance {_intervals([frechet], 1, '')}"


def _original_distance(laboratory: Laboratory) -> str:
    found = laboratory.original_judged(0)
    return "not measured yet" if found is None else f"{found[1].value:.1f}"


def _drawn(laboratory: Laboratory) -> str:
    """How many cells' samples were drawn by what."""
    judged = (cell for bits in BITS for row in ROWS for cell in laboratory.all_kept(row, bits) if cell.samples)
    counts = Counter(cell.drawn for cell in judged)
    return ", ".join(f"of {count} cells by {drawn}" for drawn, count in sorted(counts.items())) or "none yet"


def _provenance(laboratories: Sequence[Laboratory]) -> str:
    """How many cells were measured by which program and PyTorch."""
    counts = Counter(
        (figures.program, figures.torch)
        for laboratory in laboratories
        for bits in BITS
        for row in ROWS
        for figures in laboratory.all_kept(row, bits)
    )
    return ", ".join(
        f"{count} {'cell' if count == 1 else 'cells'} by program `{program}` with PyTorch {torch}"
        for (program, torch), count in sorted(counts.items())
    )


def _intervals(found: Sequence[Interval | None], factor: float, unit: str) -> str:
    """The mean over seeds, the standard deviation where there are several, and in brackets the interval of the one that
    has been resampled."""
    intervals = [interval for interval in found if interval is not None]
    if not intervals:
        return "–"
    values = spread([factor * interval.value for interval in intervals])
    for interval in intervals:
        if interval.low is not None and interval.high is not None:
            return f"{values}{unit} ({factor * interval.low:.1f} … {factor * interval.high:.1f})"
    return f"{values}{unit}"
