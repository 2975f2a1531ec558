"""NAME.report.html: everything one export measured, in a single file without outside references."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2

from exporter.charts import Chart, Series, line_chart
from exporter.container_choice import accumulator_text, exact_text
from exporter.files import write_text_atomically
from exporter.gate.table import SNR_CEILING_DB, GateResult, grouped
from exporter.images import SampleGrids
from exporter.metrics import Metrics
from exporter.quality import LayerQuality, NoiseSnr
from exporter.range_scan import Range, share_of_fp16
from exporter.scale_comparison import EVERY_CHANNEL, LayerScales

_TEMPLATE = "report.html.j2"
_MOST_RANGES = 20
_KILO = 1000.0


@dataclass(frozen=True)
class Tile:
    """A headline figure: what, how much, and what that means; `state` is "good", "bad" or "plain"."""

    label: str
    figure: str
    note: str
    state: str = "plain"


@dataclass(frozen=True)
class Report:
    """What the report shows; parts that were skipped are None or empty.

    `parts` are named sizes in bytes (if empty, the original and the output are shown); `high_precision` modules with
    their parameter counts; `recipe` the resolved recipe as YAML; `ranges` the tensors that FP16 holds, largest first.
    """

    title: str
    summary: str
    metrics: Metrics
    gate: GateResult | None
    noise: NoiseSnr | None
    layers: tuple[LayerQuality, ...]
    scales: tuple[LayerScales, ...]
    grids: SampleGrids | None
    high_precision: tuple[tuple[str, int], ...]
    parts: Mapping[str, int]
    recipe: str
    ranges: tuple[Range, ...] = ()


def write_report(path: Path, report: Report) -> None:
    """Write the page whole or not at all."""
    write_text_atomically(path, render_report(report))


def render_report(report: Report) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("exporter", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        db=decibels,
        size=file_size,
        seconds=duration,
        accumulator=accumulator_text,
        exact=exact_text,
        share_of_fp16=share_of_fp16,
    )
    chart = noise_chart(report.noise) if report.noise is not None else None
    largest = max((layer.output_sqnr_db for layer in report.layers), default=1.0)
    return environment.get_template(_TEMPLATE).render(
        report=report,
        metrics=report.metrics,
        tiles=tiles(report),
        chart=chart,
        groups=grouped(report.gate.rows) if report.gate is not None else [],
        largest_sqnr=max(largest, 1.0),
        every_channel=EVERY_CHANNEL,
        most_ranges=_MOST_RANGES,
    )


def tiles(report: Report) -> list[Tile]:
    """The headline figures."""
    metrics, quality, fidelity = report.metrics, report.metrics.quality, report.metrics.fidelity
    size = metrics.size
    shown = [
        Tile(
            "size",
            f"{100 * size.ratio:.1f} %",
            f"{file_size(size.output_bytes)} instead of {file_size(size.fp32_bytes)} in FP32",
        )
    ]
    if quality is not None:
        worst = decibels(quality.eps_snr_db_worst_step)
        shown.append(Tile("noise-prediction SNR", f"{decibels(quality.eps_snr_db_mean)} dB", f"worst step {worst} dB"))
    if quality is not None and quality.class_accuracy_quantized is not None:
        original = quality.class_accuracy_fp
        note = "" if original is None else f"original {100 * original:.1f} %"
        shown.append(Tile("class accuracy", f"{100 * quality.class_accuracy_quantized:.1f} %", note))
    if fidelity is None or report.gate is None:
        shown.append(Tile("fidelity gate", "skipped", "exported with --no-validate"))
    elif fidelity.passed:
        linear = decibels(fidelity.linear_min_snr_db)
        note = f"{len(report.gate.rows)} comparisons, worst linear {linear}{'' if linear == 'exact' else ' dB'}"
        shown.append(Tile("fidelity gate", "passed", note, "good"))
    else:
        failure = report.gate.first_failure
        shown.append(Tile("fidelity gate", "FAILED", failure.sentence() if failure else "nothing compared", "bad"))
    return shown


def noise_chart(noise: NoiseSnr) -> Chart | None:
    """Noise-prediction SNR over the sampling steps; None when no step has a finite figure."""
    named = {
        "all inputs": ("main", [step.snr_db for step in noise.steps]),
        "with prompt": ("first", [step.conditional_db for step in noise.steps]),
        "without": ("second", [step.unconditional_db for step in noise.steps]),
    }
    # A side that has every input, or none, would only draw the same line again.
    drawn = [name for name, (_, values) in named.items() if not any(math.isnan(value) for value in values)]
    if len(drawn) < len(named):
        drawn = ["all inputs"]
    series = [
        Series(
            name,
            named[name][0],
            named[name][1],
            [
                f"{name}, step {step.step} (t = {step.timestep:g}): {value:.1f} dB"
                for step, value in zip(noise.steps, named[name][1], strict=True)
            ],
        )
        for name in reversed(drawn)
    ]
    labels = [f"{step.timestep:.0f}" for step in noise.steps]
    return line_chart(labels, series, "timestep, from noise to sample", "SNR, dB")


def decibels(value: float) -> str:
    """One decimal; "exact" for no deviation at all."""
    return "exact" if value >= SNR_CEILING_DB else f"{value:.1f}"


def file_size(count: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < _KILO:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= _KILO
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
