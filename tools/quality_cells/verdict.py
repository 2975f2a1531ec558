"""Whether floats are closer to the original than integers, by the cells that have been measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from tools.marked_section import markdown_table
from tools.quality_cells.figures import Comparison, Interval
from tools.quality_cells.rows import BITS, INTEGERS, OURS, ROWS, SEEDS, Bits, Row, row_of

if TYPE_CHECKING:
    from tools.quality_cells.cells import Figures, Laboratory

NOTHING = "Not measured yet."

# Floats and integers that are given the same.
_PAIRS = (
    ("round to nearest", "fp_nearest", "int_nearest"),
    ("AdaRound, block reconstruction", "fp_adaround", "int_adaround"),
    ("GPTQ", "fp_gptq", "int_gptq"),
    ("balanced, GPTQ, then AdaRound", "ours", "int_ours"),
)
_JUDGED = (
    ("ours", "ours"),
    ("ours, unsigned behind the GELU", "fp_unsigned"),
    ("FP4DiT's formats and scales", "fp4dit"),
    ("float weights, integer activations", "mixed"),
)


def spread(values: Sequence[float], *, signed: bool = False) -> str:
    """The mean, and the standard deviation where there are several."""
    mean = f"{statistics.mean(values):{'+' if signed else ''}.1f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.1f}"


def by_method(laboratory: Laboratory) -> str:
    """Floats minus integers in noise-prediction SNR, by method and bits."""
    lines, widths = [], _widths(laboratory)
    for zero, words in (("", "around zero"), ("_zero", "with zero points")):
        for title, ours, theirs in _PAIRS:
            cells = [_cell(laboratory, row_of(ours), row_of(theirs + zero), bits) for bits in widths]
            lines.append([f"{title}; integers {words}", *cells])
    return _table("floats − integers, dB", widths, lines)


def against_best(laboratory: Laboratory) -> str:
    """Some rows of floats against whichever row of integers is best at these bits, and what all seeds agree on."""
    lines, widths = [], _widths(laboratory)
    for title, key in _JUDGED:
        for zero_points, words in ((False, "around zero"), (True, "with zero points")):
            cells = []
            for bits in widths:
                found = differences(laboratory, key, bits, zero_points=zero_points)
                found_words = [f"{spread(each, signed=True)} ({verdict(each)})" for each in found if each]
                cells.append(", ".join(found_words) or "–")
            lines.append([f"{title} − best integers {words}", *cells])
    return _table("dB of the mean, of the worst step", widths, lines)


def samples_against_integers(laboratory: Laboratory) -> str:
    """Ours less every row of integers in Fréchet distance, of each seed whose samples have been compared."""
    return _compared(laboratory, "Fréchet distance", lambda comparison: comparison.frechet)


def features_against_integers(laboratory: Laboratory) -> str:
    """By how many dB ours is closer to the original's own samples than every row of integers, likewise."""
    return _compared(laboratory, "dB in features", lambda comparison: comparison.features)


def _compared(laboratory: Laboratory, head: str, figure: Callable[[Comparison], Mapping[str, Interval]]) -> str:
    columns = [[figure(laboratory.compared(OURS, INTEGERS, bits, seed, 0)) for seed in SEEDS] for bits in BITS]
    if not any(found for column in columns for found in column):
        return ""
    lines = []
    for row in INTEGERS:
        cells = [", ".join(_signed(found[row.key]) for found in column if row.key in found) for column in columns]
        lines.append([f"ours − {row.title}", *(cell or "–" for cell in cells)])
    return _table(head, BITS, lines)


def differences(laboratory: Laboratory, key: str, bits: Bits, *, zero_points: bool) -> tuple[list[float], list[float]]:
    """The row `key` less the best row of integers, seed by seed: mean SNR, worst step. Nothing where one is missing."""
    integers = [row for row in ROWS if row.formats == "integers" and row.zero_points == zero_points]
    best = _best(laboratory, integers, bits)
    both = [] if best is None else _both(laboratory, row_of(key), best, bits)
    means = [one.snr_mean_db - other.snr_mean_db for one, other in both]
    return means, [one.snr_worst_db - other.snr_worst_db for one, other in both]


def verdict(found: Sequence[float]) -> str:
    """What floats minus integers, one number a seed, say: something only where all of several seeds agree."""
    if len(found) < 2:
        return "one seed"
    if min(found) > 0:
        return "floats closer"
    return "integers closer" if max(found) < 0 else "no difference"


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.1f} ({interval.low:+.1f} … {interval.high:+.1f})"


def _widths(laboratory: Laboratory) -> list[Bits]:
    """Those that something has been measured at."""
    return [bits for bits in BITS if any(laboratory.all_kept(row, bits) for row in ROWS)]


def _table(head: str, widths: Sequence[Bits], lines: Sequence[Sequence[str]]) -> str:
    return markdown_table([head, *(bits.name for bits in widths)], lines) if widths else NOTHING


def _best(laboratory: Laboratory, rows: Sequence[Row], bits: Bits) -> Row | None:
    means = {
        row.key: statistics.mean(figures.snr_mean_db for figures in found)
        for row in rows
        if (found := laboratory.all_kept(row, bits))
    }
    return row_of(max(means, key=means.__getitem__)) if means else None


def _cell(laboratory: Laboratory, ours: Row, theirs: Row, bits: Bits) -> str:
    means = [one.snr_mean_db - other.snr_mean_db for one, other in _both(laboratory, ours, theirs, bits)]
    return spread(means, signed=True) if means else "–"


def _both(laboratory: Laboratory, ours: Row, theirs: Row, bits: Bits) -> list[tuple[Figures, Figures]]:
    """The figures of the seeds that both have been measured with."""
    pairs = [(laboratory.kept(ours, bits, seed), laboratory.kept(theirs, bits, seed)) for seed in SEEDS]
    return [(one, other) for one, other in pairs if one is not None and other is not None]
