"""The fidelity gate as a stage: torch fake-quant against the exported and the lowered graph, and again later.

What the comparison needs is kept in a folder: the reference (manifest.json, reference.safetensors), the cut graphs (a
large graph's stand beside it), inputs and expected outputs as polygraphy reads them and the verdict (result.json).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from exporter.calibration.capture import CalibrationSet
from exporter.compute import Compute, product_type
from exporter.errors import FidelityError, InputError
from exporter.files import sha256_of, write_text_atomically
from exporter.gate.comparison import compare_graph, compare_graphs
from exporter.gate.records import ROUNDING_MARGIN_DB, Reference
from exporter.gate.reference import EXACT_DB, HEADROOM_DB, INPUT_NOISE, record_reference
from exporter.gate.runs import quiet
from exporter.gate.table import GateResult, summary_table
from exporter.gate.whole import save_runs
from exporter.memory import release_mapped_weights, return_freed_memory
from exporter.models.adapter import Adapter
from exporter.models.inputs import TransformerInputs
from exporter.models.prompts import Prompts
from exporter.onnx_files import read_model
from exporter.passes.emulate import relation_to_engine
from exporter.passes.layer_table import TARGET_KEY, read_layer_table
from exporter.progress import Progress
from exporter.targets import Target, get_target
from exporter.this_cpu import product_of, refuse_saturating_cpu

RESULT = "result.json"
_TIMESTEPS = 3
_TABLE_WIDTH = 110


def captured_batches(
    captured: CalibrationSet, prompts: Prompts, timesteps: int = _TIMESTEPS
) -> list[TransformerInputs]:
    """Inputs of a few timesteps from the first to the last; each batch has a trajectory with and without prompt."""
    steps = sorted(set(captured.step_index.tolist()))
    count = min(timesteps, len(steps))
    conditional = captured.prompt_index >= 0
    batches = []
    for position in range(count):
        here = captured.step_index == steps[position * (len(steps) - 1) // max(count - 1, 1)]
        sides = [torch.nonzero(here & side).flatten() for side in (conditional, ~conditional)]
        rows = [side[position * len(side) // count] for side in sides if len(side)]
        batches.append(captured.inputs(torch.stack(rows), prompts))
    return batches


def validate_graphs(
    original: nn.Module,
    quantized: nn.Module,
    adapter: Adapter,
    batches: Sequence[TransformerInputs],
    exported: Path,
    lowered: Path,
    folder: Path,
    target: Target,
    progress: Progress,
    compute: Compute = "fp32",
) -> tuple[GateResult, Reference]:
    """Compare both graphs with `quantized` on `batches`; print the table and the commands that repeat it.

    Everything is kept in `folder` (made if need be), the verdict also when it is a failure.

    Raises:
        FidelityError: something deviates; the message names the first linear, or else the first block.
    """
    folder.mkdir(exist_ok=True)
    # Here what lowering freed, and below what the torch models did: glibc keeps several hundred megabytes of it.
    return_freed_memory()
    record_reference(original, quantized, adapter, batches, progress, compute, product_type(target)).save(folder)
    # From here on its numbers are those in the file, which need not be in memory all the time.
    reference = Reference.load(folder)
    release_mapped_weights()
    return_freed_memory()
    with quiet(), ThreadPoolExecutor(1) as pool:
        saved = pool.submit(
            save_runs, reference.for_stage("lowered"), folder, boundaries=reference.free_samples is None
        )
        # The lowered graph's commands are the ones to repeat: it is what the engine is made of.
        found = compare_graphs(exported, lowered, reference, folder, target, progress)
        saved.result()
    notes = _notes(lowered, target, reference)
    if reference.free_samples is not None:
        notes += ("large: the commands for its linears and blocks, and their files, come from `fp4export validate`",)
    result = replace(found, notes=notes)
    return conclude(result, folder, progress), reference


def validate_output(file: Path, folder: Path, lowered: Path, progress: Progress, *, built_sha256: str) -> GateResult:
    """Compare an existing output with the reference that its export kept in `folder`.

    An .onnx file is itself compared. An engine cannot be looked into, so `lowered`, the graph that it was built from,
    is compared in its place, which the result's notes say; its SHA-256 must be `built_sha256`.

    Raises:
        InputError: `folder` holds no reference, or the file is no output of this exporter.
        EnvironmentLacksError: this CPU saturates products that the file relies on.
        FidelityError: something deviates, or an engine is not the one that was built.
    """
    reference = Reference.load(folder)
    is_graph = file.suffix == ".onnx"
    path = file if is_graph else lowered
    if not path.is_file():
        raise InputError(f"{path}: no such file; {file.name} was built from it and is validated through it")
    target = _target_of(path)
    table = read_layer_table(read_model(path, external_data=False))
    refuse_saturating_cpu({entry.layer: product_of(entry) for entry in table}, target, str(path))
    notes = _notes(path, target, reference)
    if not is_graph:
        notes = (_note_on_engine(file, path, built_sha256), *notes)
    if reference.free_samples is not None:
        # The export left out what of a large model the commands for its blocks read.
        save_runs(reference.for_stage("lowered"), folder, boundaries=True)
    result = compare_graph(path, "lowered", reference, folder, target, progress)
    return conclude(GateResult(result.rows, result.commands, notes), folder, progress)


def _note_on_engine(engine: Path, lowered: Path, built_sha256: str) -> str:
    """How the comparison of `lowered` speaks for `engine`. Raises `FidelityError` if it does not."""
    if sha256_of(engine) != built_sha256:
        raise FidelityError(f"{engine}: not the file that was built from {lowered} (SHA-256 differs); export it again")
    return f"{engine.name} was not run: {lowered}, {relation_to_engine(lowered)}, was compared"


def table_text(result: GateResult) -> str:
    """The summary table as plain text."""
    text = io.StringIO()
    console = Console(file=text, width=_TABLE_WIDTH, color_system=None)
    console.print(summary_table(result))
    for note in result.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    for command in result.commands:
        console.print(f"repeat: {command}", markup=False, highlight=False, soft_wrap=True)
    return text.getvalue().rstrip()


def conclude(result: GateResult, folder: Path, progress: Progress) -> GateResult:
    """Keep the verdict in `folder` and print it. Raises `FidelityError` if it is a failure."""
    write_text_atomically(folder / RESULT, result.to_json())
    progress.note(table_text(result))
    failure = result.first_failure
    if failure is not None:
        raise FidelityError(f"{failure.sentence()}; every comparison is in {folder / RESULT}")
    return result


def _notes(lowered: Path, target: Target, reference: Reference) -> tuple[str, ...]:
    notes = []
    if target.engine != "onnxruntime":
        notes.append(f"{target.name}: {lowered.name}, {relation_to_engine(lowered)}, was run in ONNX Runtime here")
    if reference.end_to_end_threshold < min(EXACT_DB, reference.quantization_db + HEADROOM_DB):
        notes.append(
            f"end to end: noise of {INPUT_NOISE:g} on its inputs moves the torch model itself by as much as "
            f"{reference.sensitivity_db:.1f} dB SNR, so {reference.end_to_end_threshold:.1f} dB is asked for"
        )
    return (*notes, *_notes_on_compute(reference))


def _notes_on_compute(reference: Reference) -> tuple[str, ...]:
    """What a compute type other than FP32 costs, and which limits give way to it."""
    rounding, lowered = reference.rounding, reference.for_stage("lowered")
    if rounding is None:
        return ()
    eased = sum(lowered.thresholds[name] < limit for name, limit in reference.thresholds.items())
    products = reference.linears[0].products
    inside = "FP32 inside, to the limits of FP32"
    if products != "fp32":
        inside = f"whose products are rounded to {products}, to the bound of that rounding"
    return (
        f"{rounding.compute}: rounding alone moves the torch model itself by as much as "
        f"{rounding.end_to_end_db:.1f} dB SNR end to end; {eased} of {len(reference.thresholds)} blocks and boundaries "
        f"are held to what it leaves, less {ROUNDING_MARGIN_DB:.0f} dB, and the quantized linears, {inside}",
    )


def _target_of(path: Path) -> Target:
    names = {entry.key: entry.value for entry in read_model(path, external_data=False).metadata_props}
    if TARGET_KEY not in names:
        raise InputError(f"{path}: carries no fp4export metadata; validate takes an output that fp4export wrote")
    return get_target(names[TARGET_KEY])
