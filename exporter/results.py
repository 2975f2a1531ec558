"""What an export leaves beside its engine: the report, the metrics, and what is needed to validate it again."""

from __future__ import annotations

import json
from pathlib import Path

from exporter.errors import InputError
from exporter.evaluate import Evaluation
from exporter.files import write_text_atomically
from exporter.gate.table import GateResult
from exporter.job import Job
from exporter.metrics import Fidelity, Metrics, Quality, Size, installed_versions, write_metrics
from exporter.recipe import recipe_to_yaml
from exporter.report import Report, write_report
from exporter.source import Source

_PLACE = ".origin.json"


def metrics_of(
    job: Job, source: Source, engine: Path, evaluation: Evaluation, fidelity: tuple[GateResult, float] | None
) -> Metrics:
    """The export's figures; `fidelity` is the gate's result with the quantization error it is judged against."""
    return Metrics(
        target=job.target.name,
        size=Size(source.plan.fp32_bytes, engine.stat().st_size),
        fidelity=None if fidelity is None else Fidelity.of(*fidelity),
        quality=Quality(
            evaluation.noise.mean_db,
            evaluation.noise.worst_db,
            evaluation.accuracy_original,
            evaluation.accuracy_quantized,
        ),
        seconds=job.seconds,
        versions=installed_versions(),
    )


def write_results(
    job: Job, source: Source, engine: Path, evaluation: Evaluation, fidelity: tuple[GateResult, float] | None
) -> tuple[Path, Path]:
    """Write NAME.report.html and NAME.metrics.json beside the engine; returns their paths."""
    metrics = metrics_of(job, source, engine, evaluation, fidelity)
    metrics_path, report_path = job.beside(".metrics.json"), job.beside(".report.html")
    write_metrics(metrics_path, metrics)
    report = Report(
        title=job.output.name,
        summary=f"{Path(job.recipe.name).stem} for {job.target.name} ({job.choice.reason}): "
        f"{len(source.plan.layers)} quantized layers",
        metrics=metrics,
        gate=None if fidelity is None else fidelity[0],
        noise=evaluation.noise,
        layers=evaluation.layers,
        grids=evaluation.grids,
        high_precision=source.plan.high_precision,
        parts={
            "FP32 parameters": source.plan.fp32_bytes,
            "quantized layers in FP32": sum(layer.fp32_bytes for layer in source.plan.layers),
            job.output.name: metrics.size.output_bytes,
        },
        recipe=recipe_to_yaml(job.recipe),
    )
    write_report(report_path, report)
    write_text_atomically(origin_file(job.output), json.dumps({"work_dir": str(job.work.path.absolute())}) + "\n")
    return report_path, metrics_path


def origin_file(output: Path) -> Path:
    """Where an output says which work folder it came from."""
    return output.with_name(output.name + _PLACE)


def work_folder_of(output: Path) -> Path:
    """The work folder that `output` was made in: NAME.work beside it, or what its origin file names.

    Raises `InputError` when there is none.
    """
    default = output.with_name(f"{output.stem}.work")
    try:
        folder = Path(json.loads(origin_file(output).read_text(encoding="utf-8"))["work_dir"])
    except (OSError, ValueError, KeyError, TypeError):
        folder = default
    for candidate in (folder, default):
        if candidate.is_dir():
            return candidate
    raise InputError(
        f"{output}: its work folder {default} is not here; validate needs the reference that the export kept in it"
    )
