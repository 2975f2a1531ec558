"""ONNX in, low-bit engine out: read, quantize to nearest, lower, compare, build."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from exporter.device.build import BuildOptions, build_engine
from exporter.errors import InputError
from exporter.gate.table import GateResult
from exporter.job import open_work
from exporter.memory import usable_memory
from exporter.onnx_files import data_path, external_files, read_model, save_onnx, total_bytes
from exporter.onnx_input.compare import Graphs, compare_graphs
from exporter.onnx_input.foreign import ForeignModel
from exporter.onnx_input.model import GraphState, read_source, state_of
from exporter.onnx_input.random_inputs import random_inputs
from exporter.onnx_input.room import refuse_without_room
from exporter.onnx_input.selection import FormatOptions, Selection
from exporter.onnx_input.waist import WaistModel
from exporter.origin import Origin
from exporter.passes import lowering_passes, run_passes
from exporter.passes.emulate import EMULATED, runnable_graph
from exporter.progress import NullProgress, Progress
from exporter.quantize import QuantLinear
from exporter.targets import AUTO, Target, resolve_target
from exporter.this_cpu import refuse_saturating_cpu
from exporter.validate import conclude
from exporter.workdir import WorkDir


@dataclass(frozen=True)
class OnnxResult:
    """What was made of an ONNX model, and how good it is.

    `snr_db` is the lowered graph's outputs against the given model's on random inputs; it and `fidelity` are None
    when validation was switched off.
    """

    source: Path
    output: Path
    work_dir: Path
    selection: Selection
    source_bytes: int
    output_bytes: int
    fidelity: GateResult | None
    snr_db: float | None


def load_source(source: Path, options: FormatOptions | None, target: Target) -> ForeignModel | WaistModel:
    """Read an ONNX model and decide about its layers; writes nothing.

    Raises `InputError` for what cannot be read, quantized or run by the target, for `options` with a graph that is
    quantized already, and for their absence with one that is not.
    """
    if not target.fp32_products:
        raise InputError(
            f"{source}: target {target.name} has no matrix product with an FP32 result, which ONNX models are lowered "
            "to; export from a recipe with `compute: fp16`, or use --target rtx-sm80 or later"
        )
    model = read_source(source)
    if state_of(model) is GraphState.WAIST:
        if options is not None:
            raise InputError(f"{source}: is quantized by fp4export already; leave --format out, it is only lowered")
        return WaistModel.of(source, model, target)
    if options is None:
        raise InputError(f"{source}: is not quantized; say which weight format it gets, for example --format e2m1")
    return ForeignModel.of(source, model, options, target)


def quantize_onnx(
    source: str | Path,
    output: str | Path,
    options: FormatOptions | None = None,
    *,
    target: str = AUTO,
    work_dir: str | Path | None = None,
    validate: bool = True,
    progress: Progress | None = None,
) -> OnnxResult:
    """Turn the ONNX model `source` into an engine at `output` (.onnx, .plan or .engine).

    A plain model's linear layers are rounded to nearest as `options` say; a graph that fp4export exported is only
    lowered. The output is written after the comparison has passed. Raises the errors of `exporter.errors`.
    """
    source, output, progress = Path(source), Path(output), progress or NullProgress()
    _check_output(source, output)
    free = usable_memory()
    loaded = load_source(source, options, resolve_target(target, output).target)
    choice, work = open_work(target, output, work_dir, fresh=False, progress=progress)
    if validate:
        products = {layer.name: layer.product for layer in loaded.selection.layers}
        refuse_saturating_cpu(products, choice.target, str(source))
        refuse_without_room(source, loaded.selection.layers, free)
    source_bytes = total_bytes(source)
    _note_kept(loaded.selection, progress)
    with work.locked():
        modules = loaded.modules(progress)
        exported = _exported(loaded, modules, work, choice.target, progress)
        lowered, runnable = _lowered(exported, work, choice.target, progress)
        fidelity, snr_db = None, None
        if validate:
            fidelity, snr_db = _validated(loaded, modules, Graphs(exported, runnable), work, choice.target, progress)
        _write(lowered, output, choice.target, progress)
        Origin.of(output, runnable, None).save(output)
    size = total_bytes(output) if choice.target.engine == "onnxruntime" else output.stat().st_size
    return OnnxResult(source, output, work.path, loaded.selection, source_bytes, size, fidelity, snr_db)


def _check_output(source: Path, output: Path) -> None:
    """Raise `InputError` where writing `output` would destroy the model or its weights."""
    light = read_model(source, external_data=False)
    if _same(output, source):
        raise InputError(f"{output}: is the model itself; give the output another name")
    for written in (output, data_path(output)):
        if any(_same(written, file) for file in (source, *external_files(light, source))):
            raise InputError(
                f"{output}: would write {written.name}, which {source} is made of; give the output another name"
            )


def _same(one: Path, other: Path) -> bool:
    # Files that do not exist yet have names alone.
    return one.samefile(other) if one.exists() and other.exists() else one.resolve() == other.resolve()


def _note_kept(selection: Selection, progress: Progress) -> None:
    for kept in selection.kept:
        progress.note(f"kept in high precision: {kept.name} [{kept.out_features} x {kept.in_features}]: {kept.reason}")


def _exported(
    loaded: ForeignModel | WaistModel,
    modules: dict[str, QuantLinear],
    work: WorkDir,
    target: Target,
    progress: Progress,
) -> Path:
    path = work.file(f"exported.{target.name}.onnx")
    passes = loaded.waist_passes(modules)
    model, results = run_passes(loaded.model, passes, target)
    save_onnx(model, path)
    if results:
        changes = ", ".join(f"{result.name} {result.changed}" for result in results if result.changed)
        progress.note(f"{path.stem}: {results[-1].nodes} nodes ({changes})")
    return path


def _lowered(exported: Path, work: WorkDir, target: Target, progress: Progress) -> tuple[Path, Path]:
    """The lowered graph, and what stands for it in ONNX Runtime."""
    path = work.file(f"lowered.{target.name}.onnx")
    model, results = run_passes(onnx.load(exported), lowering_passes(target), target)
    save_onnx(model, path)
    progress.note(f"{path.stem}: {results[-1].nodes} nodes")
    return path, runnable_graph(path, target, work.file(f"{EMULATED}.{target.name}.onnx"))


def _validated(
    loaded: ForeignModel | WaistModel,
    modules: dict[str, QuantLinear],
    graphs: Graphs,
    work: WorkDir,
    target: Target,
    progress: Progress,
) -> tuple[GateResult, float]:
    folder = work.file(f"gate.{target.name}")
    folder.mkdir(exist_ok=True)
    feeds = random_inputs(loaded.model, str(loaded.path))
    with progress.task("comparing with the model", 2) as task:
        run = loaded.probed(feeds, work.path)
        task.advance()
        rows = loaded.compare_rewritten(run, feeds, work.path)
        result, snr_db = compare_graphs(modules, run.layers, graphs, run.outputs, feeds, folder, target)
        task.advance()
    return conclude(replace(result, rows=(*rows, *result.rows)), folder, progress), snr_db


def _write(lowered: Path, output: Path, target: Target, progress: Progress) -> None:
    if target.engine == "onnxruntime":
        save_onnx(onnx.load(lowered), output)
    else:
        # No inputs are saved, and a folder that an earlier export left is about another graph.
        build_engine(lowered, output, target, progress, BuildOptions(acceptance=False))
