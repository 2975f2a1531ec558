"""Measure the README's results on the shipped digits model and write them between its markers.

`python -m tools.digits_results` runs every row as a real export for the CPU target, in build/results.work (finished
stages are reused), and takes about 15 minutes on two cores.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from exporter import export, load_recipe
from exporter.metrics import installed_versions, read_metrics
from exporter.progress import RichProgress

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
START, END = "<!-- results: written by tools/digits_results.py -->", "<!-- end of results -->"
_PLAIN = ("method.balance=false",)
_NEAREST = (*_PLAIN, "method.name=rtn")
_ADAROUND = (*_PLAIN, "method.start=nearest", "method.learning_rate=0.03")
_INTEGERS = ("layers=[{match: 'transformer_blocks.*', weight: int4, group: 128, scales: group, activation: int6}]",)


@dataclass(frozen=True)
class Row:
    """One line of the table: what it is, and how the digits recipe is changed for it."""

    name: str
    changes: tuple[str, ...]


ROWS = (
    Row("W4A6 integers, INT4/INT6, round to nearest", (*_INTEGERS, *_NEAREST)),
    Row("W4A6, E2M1/E2M3, round to nearest", _NEAREST),
    Row("W4A6, E2M1/E2M3, AdaRound", _ADAROUND),
    Row("W4A6, E2M1/E2M3, error feedback (GPTQ)", (*_PLAIN, "method.name=gptq")),
    Row("**W4A6, E2M1/E2M3, balanced, GPTQ, AdaRound** (the recipe)", ()),
    Row("W4A8, E2M1/E4M3, AdaRound", ("preset=w4a8", *_ADAROUND)),
    Row("W4A16, E2M1, AdaRound", ("preset=w4a16", *_ADAROUND)),
    Row("W8A8, E4M3/E4M3, round to nearest", ("preset=w8a8", *_NEAREST)),
)


def measure(row: Row, folder: Path) -> str:
    """Export the row and return its line of the table."""
    result = export(
        load_recipe(ROOT / "recipes" / "digits.yaml", row.changes),
        folder / "results.onnx",
        progress=RichProgress(Console(stderr=True)),
    )
    metrics = read_metrics(result.metrics)
    quality, size = metrics["quality"], metrics["size"]
    cells = (
        row.name,
        f"{quality['eps_snr_db_mean']:.1f}",
        f"{quality['eps_snr_db_worst_step']:.1f}",
        f"{100 * quality['class_accuracy_quantized']:.1f} %",
        f"{size['output_bytes'] / size['fp32_bytes']:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def table(folder: Path) -> str:
    """All rows as Markdown, with what they were measured on."""
    lines = [measure(row, folder) for row in ROWS]
    versions = installed_versions()
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "onnxruntime", "onnx"))
    return "\n".join(
        [
            "| | noise-prediction SNR, mean | worst step | recognised samples | size of FP32 |",
            "|---|---|---|---|---|",
            *lines,
            "",
            f"Measured by `python -m tools.digits_results` on {platform.machine()}, {used}; one calibration seed, so "
            "differences of a few tenths of a decibel mean nothing.",
        ]
    )


def main() -> int:
    """Measure and rewrite the README."""
    folder = ROOT / "build"
    folder.mkdir(exist_ok=True)
    measured = table(folder)
    before, _, rest = README.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{START}\n{measured}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
