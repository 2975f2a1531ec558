"""The stages behind the calibrated weights, up to the engine: each takes the job and what those before it made."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
from torch import nn

from exporter.calibration.capture import CalibrationSet
from exporter.device.begun import BegunEngine
from exporter.device.build import BuildOptions, build_engine
from exporter.errors import InputError
from exporter.files import atomic_path, write_text_atomically
from exporter.gate.table import GateResult
from exporter.job import Job
from exporter.kernels import obtain_kernels
from exporter.onnx_files import LARGEST_WORK_FILE_BYTES, data_path, read_model, save_onnx, total_bytes
from exporter.origin import Origin
from exporter.passes import WAIST_PASSES, Pass, lowering_passes, run_passes
from exporter.passes.layer_table import read_layer_table
from exporter.quantize import CalibrationResult, quantize_model
from exporter.recipe import recipe_to_yaml
from exporter.source import Source
from exporter.stage_files import weights_file
from exporter.to_onnx import to_onnx
from exporter.validate import captured_batches, validate_graphs
from exporter.workdir import key_of, name_for, verb


def fake_quantized(_job: Job, source: Source, calibrated: CalibrationResult) -> nn.Module:
    """The reference: the torch model with every planned linear fake-quantized."""
    return quantize_model(source.model, source.plan, calibrated.weights)


def traced_key(job: Job, source: Source) -> str:
    """The key of the traced graph, which depends on the calibrated weights and on nothing of the target."""
    return key_of(stage="trace", calibrated=weights_file(job, source).key, containers=_asked_containers(source))


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
