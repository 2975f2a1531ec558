"""What an export leaves beside its engine for people and programs to read: the report and the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exporter.describe import transforms_text
from exporter.evaluate import Evaluation
from exporter.gate.table import GateResult
from exporter.job import Job
from exporter.metrics import (
    ComputeFigures,
    Fidelity,
    LayerContainer,
    LayerFormat,
    Metrics,
    Quality,
    Size,
    installed_versions,
    write_metrics,
)
from exporter.range_scan import largest_first
from exporter.ranges import Amax
from exporter.recipe import recipe_to_yaml
from exporter.report import Report, write_report
from exporter.scale_comparison import summarize
from exporter.source import Source
from exporter.stages import output_bytes


def metrics_of(
    job: Job,
    source: Source,
    engine: Path,
    evaluation: Evaluation,
    fidelity: tuple[GateResult, float] | None,
    amax: Amax | None,
) -> Metrics:
    """The export's figures; `fidelity` is the gate's result with the quantization error it is judged against, `amax`
    the largest number that FP16 must hold."""
    return Metrics(
        target=job.target.name,
        kernels=job.target.kernels,
        size=Size(source.plan.fp32_bytes, output_bytes(engine)),
        fidelity=None if fidelity is None else Fidelity.of(*fidelity),
        quality=Quality(
            evaluation.noise.mean_db,
            evaluation.noise.worst_db,
            evaluation.accuracy_original,
            evaluation.accuracy_quantized,
        ),
        compute=ComputeFigures(job.recipe.compute, *((amax.value, amax.place) if amax else (None, None))),
        seconds=job.seconds,
        versions=installed_versions(),
        layers=tuple(LayerContainer.of(layer) for layer in source.plan.layers),
        scales=summarize(evaluation.scales),
        formats=tuple(LayerFormat(one.layer, one.chosen, one.snr_db, one.refused) for one in source.formats),
    )


def _among_them(transforms: str) -> str:
    return f" ({transforms})" if transforms else ""


def _reached(amax: Amax | None) -> str:
    return "" if amax is None else f" (numbers up to {amax.value:.4g}, at {amax.place})"


def write_results(
    job: Job,
    source: Source,
    engine: Path,
    evaluation: Evaluation,
    fidelity: tuple[GateResult, float] | None,
    ranges: Sequence[Amax] = (),
) -> tuple[Path, Path]:
    """Write NAME.report.html, NAME.metrics.json beside the engine; returns their paths.

    `ranges` are of the tensors that FP16 must hold.
    """
    amax = max(ranges, key=lambda one: one.value, default=None)
    metrics = metrics_of(job, source, engine, evaluation, fidelity, amax)
    metrics_path, report_path = job.beside(".metrics.json"), job.beside(".report.html")
    write_metrics(metrics_path, metrics)
    report = Report(
        title=job.output.name,
        summary=f"{Path(job.recipe.name).stem} for {job.target.name} ({job.choice.reason}): "
        f"{len(source.plan.layers)} quantized layers{' as plugins' * (job.target.kernels == 'plugin')}"
        f"{_among_them(transforms_text(source.plan.layers))}, "
        f"{job.recipe.compute} outside them{_reached(amax)}",
        metrics=metrics,
        gate=None if fidelity is None else fidelity[0],
        noise=evaluation.noise,
        layers=evaluation.layers,
        scales=evaluation.scales,
        grids=evaluation.grids,
        high_precision=source.plan.high_precision,
        parts={
            "FP32 parameters": source.plan.fp32_bytes,
            "quantized layers in FP32": sum(layer.fp32_bytes for layer in source.plan.layers),
            job.output.name: metrics.size.output_bytes,
        },
        recipe=recipe_to_yaml(job.recipe),
        ranges=largest_first(ranges),
    )
    write_report(report_path, report)
    return report_path, metrics_path
