"""The stages between the loaded model and the engine: each takes the job and what the stages before it made."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from exporter.calibration.calibrate import calibrate, check_batches
from exporter.calibration.capture import CalibrationSet, capture_trajectories
from exporter.calibration.finished import UnitFiles
from exporter.calibration_stages import sample_weights
from exporter.device.begun import BegunEngine
from exporter.device.build import BuildOptions, build_engine
from exporter.errors import InputError
from exporter.files import atomic_path, write_text_atomically
from exporter.gate.table import GateResult
from exporter.job import Job
from exporter.kernels import obtain_kernels
from exporter.model_stages import changes_of_model
from exporter.onnx_files import LARGEST_WORK_FILE_BYTES, checksum_of, data_path, read_model, save_onnx, total_bytes
from exporter.origin import Origin
from exporter.passes import WAIST_PASSES, Pass, lowering_passes, run_passes
from exporter.passes.layer_table import read_layer_table
from exporter.quantize import CalibrationResult, load_quantized, quantize_model, save_quantized
from exporter.recipe import recipe_to_yaml
from exporter.source import Source
from exporter.to_onnx import to_onnx
from exporter.validate import captured_batches, validate_graphs
from exporter.workdir import QUANTIZED, key_of, name_for, verb

CAPTURED = "calibration.safetensors"


def captured_inputs(job: Job, source: Source) -> CalibrationSet:
    """The transformer's inputs along real sampler trajectories, for calibration and for the gate.

    Raises `InputError` where another recipe's calibration was interrupted, whose units would be forgotten, and where
    the inputs could not be shared out among the processes that calibrate.
    """
    settings = job.recipe.calibration
    check_batches(job.recipe.method, settings.inputs, job.shard)
    _refuse_unfinished(job, source)
    return capture(job, source, CAPTURED, trajectories=settings.samples, seed=settings.seed)


def capture(job: Job, source: Source, name: str, *, trajectories: int, seed: int) -> CalibrationSet:
    """Trajectories of the original model, sealed in the work folder as `name`."""
    settings = job.recipe.calibration

    def make(path: Path) -> None:
        with source.placement.computing():
            capture_trajectories(
                source.model,
                source.adapter,
                source.prompts,
                settings,
                job.progress,
                trajectories=trajectories,
                seed=seed,
                latent_shape=source.latent_shape,
                scheduler_config=source.files.scheduler,
                placement=source.placement,
            ).save(path)

    key = key_of(
        stage="capture",
        model=source.identity,
        shape=source.latent_shape,
        settings=settings.sampler,
        device=source.placement.device.type,
        trajectories=trajectories,
        seed=seed,
    )
    path, reused = job.work.obtain(name, key, make)
    captured = CalibrationSet.load(path)
    job.progress.note(f"{verb(reused, 'captured')} {len(captured)} inputs of {trajectories} trajectories")
    return captured


def calibrated_weights(job: Job, source: Source, captured: CalibrationSet) -> CalibrationResult:
    """Codes and scales of every planned layer, sealed in the work folder; until all are there, unit by unit."""
    units = _unit_files(job, source, _made_of(job, source))

    def make(path: Path) -> None:
        # Again: by now it is sure that there is something to calibrate, and every layer has its format.
        units.refuse_others()
        units.begin()
        job.shard.agree(True)
        save_quantized(path, _calibrated(job, source, captured, units), source.plan)

    path, reused = job.work.obtain(_weights_name(job, source), calibration_key(job, source), make)
    if reused:
        job.shard.agree(False)
    units.remove()
    earlier = f", {units.found} units of an earlier run" if units.found else ""
    job.progress.note(
        f"{verb(reused, 'calibrated')} {len(source.plan.layers)} layers ({job.recipe.method.name}){earlier}"
    )
    return load_quantized(path, source.plan)


def _weights_name(job: Job, source: Source) -> str:
    """Named by all that it takes hours for: another method's weights do not replace finished ones."""
    settings = [source.layer_facts(), job.recipe.method.model_dump(), job.recipe.calibration.captured]
    return name_for(QUANTIZED, ".safetensors", settings)


def _refuse_unfinished(job: Job, source: Source) -> None:
    """Before anything takes long, raise `InputError` where another recipe's calibration was interrupted.

    Not where this one's weights are there, which takes nothing away from the other one, as the next target of a bundle;
    and not where formats are open, since nothing tells yet whose units those are. `calibrated_weights` looks again.
    """
    if not source.plan.open and not job.work.file(_weights_name(job, source)).is_file():
        _unit_files(job, source).refuse_others()


def assist_calibration(job: Job, source: Source, captured: CalibrationSet) -> None:
    """What processes other than the first do while it runs `calibrated_weights`, unless these are finished."""
    if job.shard.agree(False):
        _calibrated(job, source, captured, _unit_files(job, source, _made_of(job, source)))


def _calibrated(job: Job, source: Source, captured: CalibrationSet, units: UnitFiles) -> CalibrationResult:
    units.check_shared()
    with source.placement.computing():
        run = source.calibration_run(captured, sample_weights(job, source, captured), job.shard)
        seed = job.recipe.calibration.seed
        result = calibrate(source.model, source.plan, run, job.recipe.method, seed, job.progress, units)
    # The first process removes the units' files next, which the others may still be reading.
    job.shard.wait()
    return result


def _made_of(job: Job, source: Source) -> list[str]:
    """Checksums of what units are made of: where a stage before them gives something else, they do not fit."""
    return [checksum_of(job.work.file(name)) for name in (CAPTURED, *changes_of_model(job, source))]


def _unit_files(job: Job, source: Source, made_of: Sequence[str] = ()) -> UnitFiles:
    return UnitFiles(job.work, source.plan, calibration_settings(job, source), job.shard, made_of)


def calibration_key(job: Job, source: Source) -> str:
    """The key of the calibrated weights, on which all later stages depend.

    Weights fit the changed model that they were made for, to the last bit: other machines may change it otherwise.
    """
    model = [checksum_of(job.work.file(name)) for name in changes_of_model(job, source)]
    return key_of(stage="calibrate", changed_model=model, **calibration_settings(job, source))


def calibration_settings(job: Job, source: Source) -> dict[str, Any]:
    """All that the calibrated weights depend on beside the program, as JSON values by name."""
    return {
        "model": source.identity,
        "latent_shape": source.latent_shape,
        "calibration": job.recipe.calibration.captured,
        "device": source.placement.device.type,
        "method": job.recipe.method.model_dump(),
        "layers": source.layer_facts(),
    }


def fake_quantized(_job: Job, source: Source, calibrated: CalibrationResult) -> nn.Module:
    """The reference: the torch model with every planned linear fake-quantized."""
    return quantize_model(source.model, source.plan, calibrated.weights)


def traced_key(job: Job, source: Source) -> str:
    """The key of the traced graph, which depends on the calibrated weights and on nothing of the target."""
    return key_of(stage="trace", calibrated=calibration_key(job, source), containers=_asked_containers(source))


def _asked_containers(source: Source) -> list[str]:
    return [layer.asked_container for layer in source.plan.layers]


def exported_graph(job: Job, source: Source, quantized: nn.Module) -> Path:
    """The waist: traced by torch, then fused, folded and packed, still without a target's operators."""
    example = source.example_inputs(batch=2)
    final = job.work.file(name_for("traced", ".onnx", [source.layer_facts(), _asked_containers(source)]))

    def make(path: Path) -> None:
        to_onnx(quantized, source.adapter, example, path, final, job.progress)

    traced, _ = job.work.obtain(final.name, traced_key(job, source), make)
    path = _rewritten(job, traced, WAIST_PASSES, f"exported.{job.target.name}")
    _check_containers(source, path)
    return path


def _check_containers(source: Source, exported: Path) -> None:
    """Raise `InputError` unless the exported graph has every layer in the container that was planned for it."""
    found = {entry.layer: entry.container for entry in read_layer_table(read_model(exported, external_data=False))}
    for layer in source.plan.layers:
        if found.get(layer.name) != layer.container:
            raise InputError(
                f"{layer.name}: planned for container {layer.container}, but the graph has "
                f"{found.get(layer.name, 'no quantized layer of this name')}"
            )


def lowered_graph(job: Job, source: Source, exported: Path) -> Path:
    """The graph that the target's engine is made of."""
    note = source.plan.vnni_note(job.target)
    if note:
        job.progress.note(f"warning: {note}")
    passes = lowering_passes(job.target, job.recipe.compute)
    return _rewritten(job, exported, passes, f"lowered.{job.target.name}")


def _rewritten(job: Job, source: Path, passes: tuple[Pass, ...], name: str) -> Path:
    folder = job.work.file("graphs")

    def keep(pass_name: str, index: int, model: onnx.ModelProto) -> None:
        folder.mkdir(exist_ok=True)
        save_onnx(model, folder / f"{name}.{index:02d}.{pass_name}.onnx", LARGEST_WORK_FILE_BYTES)

    model, results = run_passes(onnx.load(source), passes, job.target, keep if job.keep_graphs else None)
    path = job.work.file(f"{name}.onnx")
    # Graphs that the gate cut read the weights that are replaced now.
    for cut in path.parent.glob(f"*.{job.target.name}.*.onnx"):
        cut.unlink()
    save_onnx(model, path, LARGEST_WORK_FILE_BYTES)
    changes = ", ".join(f"{result.name} {result.changed}" for result in results if result.changed)
    job.progress.note(f"{name}: {results[-1].nodes} nodes ({changes})")
    return path


def check_fidelity(
    job: Job, source: Source, quantized: nn.Module, captured: CalibrationSet, exported: Path, lowered: Path
) -> tuple[GateResult, float]:
    """The gate's result, and the quantization error in dB that it is judged against. Raises `FidelityError`."""
    result, reference = validate_graphs(
        source.model,
        quantized,
        source.adapter,
        captured_batches(captured, source.prompts),
        exported,
        lowered,
        job.gate_folder,
        job.target,
        job.progress,
        job.recipe.compute,
    )
    return result, reference.quantization_db


def _copy_onnx(source: Path, copy: Path) -> None:
    if data_path(source).is_file():
        save_onnx(read_model(source), copy)
        return
    with atomic_path(copy) as temporary:
        shutil.copyfile(source, temporary)
    data_path(copy).unlink(missing_ok=True)


def compiled_kernels(job: Job, lowered: Path) -> None:
    """The kernels of the lowered graph's plugins, compiled ahead of time into lowered.TARGET.kernels/ beside it."""
    folder, reused = obtain_kernels(lowered, job.target, job.work, job.progress)
    count = len(list(folder.glob("*.ptx")))
    job.progress.note(f"{verb(reused, 'compiled')} {count} kernels ({folder})")


def build(job: Job, lowered: Path, runnable: Path, begun: BegunEngine | None, *, validated: bool) -> Path:
    """The engine at the job's output: the lowered graph itself for ONNX Runtime, else what TensorRT makes of it, which
    may have `begun`.

    Beside it, the recipe as it was resolved and the origin, by which `validate` finds the reference and the graph
    that was compared with it (`runnable`).
    """
    if job.target.engine == "onnxruntime":
        _copy_onnx(lowered, job.output)
    else:
        build_engine(lowered, job.output, job.target, job.progress, BuildOptions(acceptance=validated), begun)
    write_text_atomically(job.beside(".recipe.yaml"), recipe_to_yaml(job.recipe))
    Origin.of(job.output, runnable, job.gate_folder if validated else None).save(job.output)
    job.progress.note(f"wrote {job.output} ({output_bytes(job.output) / 1e6:.2f} MB)")
    return job.output


def output_bytes(output: Path) -> int:
    """Size of an output, an ONNX file's weights in a file of their own included."""
    return total_bytes(output) if output.suffix == ".onnx" else output.stat().st_size
