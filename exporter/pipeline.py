"""The whole flow, from recipe to engine, each stage one line.

Every arrow is a value that can be saved, looked at and resumed from: captured inputs and calibrated weights are
sealed in the work folder, graphs are files, and the gate and the report read what the stages before them wrote.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from exporter.activation_room import check_room
from exporter.calibration.capture import CalibrationSet
from exporter.calibration_stages import (
    assist_calibration,
    calibrated_weights,
    captured_inputs,
    formats_chosen,
    shared_key,
)
from exporter.device.build import engine_begun
from exporter.evaluate import Evaluation, evaluate
from exporter.gate.table import GateResult
from exporter.job import Job, open_job
from exporter.model_stages import balanced, transformed
from exporter.origin import Origin
from exporter.passes.emulate import EMULATED, runnable_graph
from exporter.progress import NullProgress, Progress
from exporter.ranges import Amax, checked_ranges
from exporter.recipe import Recipe
from exporter.results import write_results
from exporter.shards import Shard
from exporter.source import Source, load_source
from exporter.stage_files import captured_file
from exporter.stages import build, check_fidelity, compiled_kernels, exported_graph, fake_quantized, lowered_graph
from exporter.this_cpu import refuse_saturating_cpu
from exporter.validate import validate_output as validate_again


@dataclass(frozen=True)
class Prepared:
    """What an engine is made of, not validated yet: the exported and the lowered graph, `runnable` in ONNX Runtime, and
    the model that is their reference on the inputs that were `captured`.

    `ranges` is what FP16 must hold, () for other compute types.
    """

    source: Source
    captured: CalibrationSet
    quantized: nn.Module
    exported: Path
    lowered: Path
    runnable: Path
    ranges: tuple[Amax, ...]


@dataclass(frozen=True)
class ExportResult:
    """Where everything is, and how good it is. `fidelity` is None when validation was switched off."""

    output: Path
    report: Path
    metrics: Path
    work_dir: Path
    fidelity: GateResult | None
    evaluation: Evaluation


def export(
    recipe: Recipe,
    output: str | Path,
    *,
    work_dir: str | Path | None = None,
    validate: bool = True,
    keep_graphs: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
    shard: Shard | None = None,
) -> ExportResult:
    """Run the main job: `recipe` to an engine at `output` (.onnx, .plan or .engine).

    Stages that an earlier run finished with the same inputs are reused from `work_dir` (default: NAME.work beside
    the output) unless `fresh`. `keep_graphs` keeps the graph after every pass. Raises the errors of
    `exporter.errors`; the output is written only after validation has passed. With a `shard` this is the first of
    several processes, the others of which run `assist_export`.
    """
    progress = progress or NullProgress()
    job = open_job(recipe, output, work_dir, fresh=fresh, keep_graphs=keep_graphs, progress=progress, shard=shard)
    with job.work.locked(), job.shard.joined():
        made = prepare(job, validate=validate)
        # Without the gate there is nothing that the builder could run beside.
        beside = engine_begun(made.lowered, job.target, job.work.path) if validate else nullcontext()
        with beside as begun:
            if begun is not None:
                job.progress.note(f"the engine for {job.target.name} is being built beside the validation")
            fidelity = finish_lowered(job, made, validate=validate)
            engine = job.timed("build", build, made.lowered, made.runnable, begun, validated=validate)
        evaluation = job.timed("evaluate", evaluate, made.source, made.quantized, made.runnable)
        report, metrics = write_results(job, made.source, engine, evaluation, fidelity, made.ranges)
    return ExportResult(engine, report, metrics, job.work.path, fidelity[0] if fidelity else None, evaluation)


def assist_export(recipe: Recipe, output: str | Path, *, work_dir: str | Path | None, shard: Shard) -> None:
    """Calibrate together with the process that runs `export` with the same words, and with whose folder; write nothing.

    Ends when the calibration does.
    """
    with shard.joined():
        shard.wait()
        progress = NullProgress()
        job = open_job(recipe, output, work_dir, fresh=False, keep_graphs=False, progress=progress, shard=shard)
        source = load_source(job)
        shard.check_alike(shared_key(job, source))
        captured = CalibrationSet.load(captured_file(job, source).path)
        source = transformed(job, balanced(job, source, captured))
        assist_calibration(job, formats_chosen(job, source, captured), captured)


def prepare(job: Job, *, validate: bool) -> Prepared:
    """Every stage up to the graph that the engine is built from.

    Raises `EnvironmentLacksError` where activations will have no room, before weights are read, and where it is to be
    validated and this CPU saturates its products.
    """
    check_room(job)
    source = job.timed("load", load_source)
    # Not the source itself: the loaded model is not kept beside the changed one.
    shared = shared_key(job, source)
    if validate:
        products = {layer.name: layer.product for layer in source.plan.layers}
        refuse_saturating_cpu(products, job.target, job.recipe.name)
    captured = job.timed("capture", captured_inputs, source)
    source = job.timed("balance", balanced, source, captured)
    source = job.timed("transform", transformed, source)
    source = job.timed("formats", formats_chosen, source, captured)
    # What these stages wrote the other processes read now.
    job.shard.wait()
    job.shard.check_alike(shared)
    calibrated = job.timed("calibrate", calibrated_weights, source, captured)
    quantized = job.timed("quantize", fake_quantized, source, calibrated)
    # The codes, a byte each; the quantized model holds them packed.
    del calibrated
    exported = job.timed("export", exported_graph, source, quantized)
    ranged = job.recipe.compute == "fp16"
    ranges = job.timed("ranges", checked_ranges, source, captured, exported) if ranged else ()
    lowered = job.timed("lower", lowered_graph, source, exported)
    runnable = runnable_graph(lowered, job.target, job.work.file(f"{EMULATED}.{job.target.name}.onnx"))
    return Prepared(source, captured, quantized, exported, lowered, runnable, ranges)


def finish_lowered(job: Job, made: Prepared, *, validate: bool) -> tuple[GateResult, float] | None:
    """Validate the graphs and compile the kernels of their plugins: all that an engine needs beside the lowered graph.

    The gate's result with the quantization error in dB that it is judged against; None where it was not to `validate`.
    Raises `FidelityError`.
    """
    fidelity = None
    if validate:
        graphs = (made.exported, made.runnable)
        fidelity = job.timed("validate", check_fidelity, made.source, made.quantized, made.captured, *graphs)
    if job.target.kernels == "plugin":
        job.timed("kernels", compiled_kernels, made.lowered)
    return fidelity


def validate_output(output: str | Path, progress: Progress | None = None) -> GateResult:
    """Repeat the fidelity gate on a finished output, with the reference kept in its work folder.

    Raises `InputError` where there is no reference, `FidelityError` where the output deviates from it.
    """
    path = Path(output)
    origin = Origin.load(path)
    return validate_again(
        path, origin.gate, origin.graph, progress or NullProgress(), built_sha256=origin.output_sha256
    )
