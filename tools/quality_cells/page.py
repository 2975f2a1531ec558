"""docs/quality.md out of the cells that have been measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tools.quality_cells.figures import Interval
from tools.quality_cells.rows import BITS, ROWS, SEEDS, Bits, Row

if TYPE_CHECKING:
    from tools.quality_cells.cells import Figures, Laboratory

_HEADING = (
    "| method | noise-prediction SNR, dB | worst step | drift, dB | recognised | Fréchet distance | CPU s | seeds |\n"
    "|---|---|---|---|---|---|---|---|"
)
_NOTHING = "Not measured yet."
# Floats and integers that are given the same.
_PAIRS = (
    ("round to nearest", "fp_nearest", "int_nearest"),
    ("AdaRound, block reconstruction", "fp_adaround", "int_adaround"),
    ("GPTQ", "fp_gptq", "int_gptq"),
    ("balanced, GPTQ, then AdaRound", "ours", "int_ours"),
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
        digits_comparison=comparison(digits),
        shapes_comparison=comparison(shapes),
        nothing=_NOTHING,
        seeds=", ".join(map(str, SEEDS)),
    )


def table(laboratory: Laboratory, bits: Bits) -> str:
    """Every method at these bits that has been measured."""
    lines = [line for row in ROWS if (line := _line(row, laboratory.all_kept(row, bits)))]
    return "\n".join([_HEADING, *lines]) if lines else _NOTHING


def comparison(laboratory: Laboratory) -> str:
    """Floats minus integers in noise-prediction SNR, by method and bits."""
    lines = [f"| floats − integers, dB | {' | '.join(bits.name for bits in BITS)} |", f"|---|{'---|' * len(BITS)}"]
    for title, ours, theirs in _PAIRS:
        cells = []
        for bits in BITS:
            pairs = [[laboratory.kept(_row(key), bits, seed) for key in (ours, theirs)] for seed in SEEDS]
            differences = [one.snr_mean_db - other.snr_mean_db for one, other in pairs if one and other]
            cells.append(_spread(differences, signed=True) if differences else "–")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _row(key: str) -> Row:
    return next(row for row in ROWS if row.key == key)


def _line(row: Row, found: Sequence[Figures]) -> str:
    if not found:
        return ""
    judged = next((figures for figures in found if figures.samples), None)
    cells = [
        row.title,
        _spread([figures.snr_mean_db for figures in found]),
        _spread([figures.snr_worst_db for figures in found]),
        _spread([figures.drift_db for figures in found]),
        "–" if judged is None else _interval(judged.recognised, 100, " %"),
        "–" if judged is None else _interval(judged.frechet, 1, ""),
        f"{statistics.mean(figures.calibration_seconds for figures in found):.0f}",
        str(len(found)),
    ]
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float], *, signed: bool = False) -> str:
    """The mean, and the standard deviation where there are several."""
    mean = f"{statistics.mean(values):{'+' if signed else ''}.1f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.1f}"


def _interval(interval: Interval | None, factor: float, unit: str) -> str:
    if interval is None:
        return "–"
    digits = 1 if factor > 1 else 3
    low, value, high = (f"{factor * one:.{digits}f}" for one in (interval.low, interval.value, interval.high))
    return f"{value}{unit} ({low} … {high})"
