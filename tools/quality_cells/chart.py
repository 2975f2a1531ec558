"""docs/quality.svg: noise-prediction SNR of every method, one panel per number of bits."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.files import atomic_path
from tools.quality_cells.rows import BITS, ROWS, Row

if TYPE_CHECKING:
    from tools.quality_cells.cells import Laboratory

_COLORS = {"integers": "#b0a8b9", "published": "#d1495b", "mixed": "#3d8b7d"}
_FLOATS = "#2b6cb0"


def draw(laboratory: Laboratory, path: Path) -> None:
    """A dot per method at the mean over seeds, with a bar from the least to the largest."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "fp4export"
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(BITS), figsize=(15, 0.3 * len(ROWS) + 1), sharey=True, layout="constrained")
    for axes, bits in zip(panels, BITS, strict=True):
        axes.set_title(bits.name, loc="left")
        axes.set_xlabel("noise-prediction SNR, dB")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        for position, row in enumerate(ROWS):
            values = [figures.snr_mean_db for figures in laboratory.all_kept(row, bits)]
            if values:
                axes.plot([min(values), max(values)], [position] * 2, color=_color(row), linewidth=2)
                axes.plot(statistics.mean(values), position, "o", color=_color(row), markersize=5)
    panels[0].set_yticks(range(len(ROWS)), [_label(row) for row in ROWS])
    panels[0].set_ylim(len(ROWS) - 0.5, -0.5)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)


def _label(row: Row) -> str:
    """The title without Markdown."""
    return re.sub(r"[*`]", "", row.title.replace("`*.", "`"))


def _color(row: Row) -> str:
    return _COLORS.get(row.formats, _FLOATS)
