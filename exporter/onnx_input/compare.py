"""The fidelity gate for a graph that was ONNX from the start: no torch model of the whole, but one of every layer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto

from exporter.errors import FidelityError, InputError
from exporter.gate.linears import compare_linears
from exporter.gate.records import LinearRecord
from exporter.gate.reference import EXACT_DB, HEADROOM_DB, INPUT_NOISE, SENSITIVITY_MARGIN_DB
from exporter.gate.rows import linear_record
from exporter.gate.runs import run_graph
from exporter.gate.snr import power_ratio_db, snr_db
from exporter.gate.subgraphs import CutError
from exporter.gate.table import GateResult, GateRow, Stage, bounded_db
from exporter.memory import return_freed_memory
from exporter.onnx_files import read_model, save_onnx
from exporter.onnx_input.linears import FoundLinear
from exporter.onnx_input.probe import Probed
from exporter.passes.driver import Pass, run_passes
from exporter.passes.layer_table import read_layer_table
from exporter.passes.tiling import untiled
from exporter.quantize import QuantLinear
from exporter.runtime import OnnxSession
from exporter.targets import Target

Arrays = Mapping[str, npt.NDArray[Any]]

# How well x·Wᵀ + b in float32 meets what a graph itself computes in its own type; a wrong reading ends near 0 dB.
_READING_DB: Mapping[int, float] = {TensorProto.FLOAT: 80.0, TensorProto.FLOAT16: 40.0, TensorProto.BFLOAT16: 25.0}


@dataclass(frozen=True)
class Graphs:
    """The quantized graph with function bodies, and what stands for the lowered one in ONNX Runtime."""

    exported: Path
    lowered: Path


def check_reading(linear: FoundLinear, probed: Probed) -> None:
    """Raise `FidelityError` unless the layer, as it was read, computes what the graph's own nodes computed."""
    bias = linear.bias_values()
    y = probed.x.astype(np.float64) @ linear.weight().T + (0 if bias is None else bias)
    found, needed = snr_db(probed.y, y), _READING_DB[linear.element_type]
    # A Gemm's addend that is no bias stays outside the layer, so there is nothing to compare with.
    has_addend = linear.first.op == "Gemm" and len(linear.first.inputs) > 2 and bias is None
    if not has_addend and not found >= needed:
        raise FidelityError(
            f"{linear.name}: was read as a linear layer, but the model computes something else there "
            f"({bounded_db(found):.1f} dB, at least {needed:.0f} dB needed); keep it with --keep '{linear.name}'"
        )


def compare_rewritten(
    model: onnx.ModelProto, passes: Sequence[Pass], original: Arrays, feeds: Arrays, folder: Path, target: Target
) -> GateRow:
    """The foreign `model` after `passes` alone, nothing quantized, against its own outputs `original` on `feeds`.

    They must agree to EXACT_DB, or as well as the model does with itself on inputs changed as little as rounding does.
    Needs room for the model in `folder` meanwhile. Raises `FidelityError` where the rewritten graph does not run.
    """
    rewritten, _ = run_passes(model, passes, target)
    found = outputs_snr_db(original, _outputs(rewritten, feeds, folder))
    sensitivity = outputs_snr_db(original, _outputs(model, _all_shaken(feeds), folder))
    found, needed = bounded_db(found), bounded_db(min(EXACT_DB, sensitivity - SENSITIVITY_MARGIN_DB))
    passed = found >= needed
    reason = f"the passes alone change the outputs: SNR {found:.1f} dB, at least {needed:.1f} dB needed"
    detail = "" if passed else reason
    return GateRow("exported", "end_to_end", "not quantized", found, needed, passed=passed, detail=detail)


def _outputs(model: onnx.ModelProto, feeds: Arrays, folder: Path) -> Arrays:
    with tempfile.TemporaryDirectory(dir=folder) as room:
        path = Path(room) / "not_quantized.onnx"
        save_onnx(model, path)
        try:
            return OnnxSession(path).run(feeds)
        except InputError as error:
            raise FidelityError(f"the passes' result, not quantized: {str(error).removeprefix(f'{path}: ')}") from error


def compare_graphs(
    modules: Mapping[str, QuantLinear],
    probed: Mapping[str, Probed],
    graphs: Graphs,
    original: Arrays,
    feeds: Arrays,
    folder: Path,
    target: Target,
) -> tuple[GateResult, float]:
    """Every quantized layer on its own inputs against its torch module, in both graphs; then the lowered graph as a
    whole against the exported one.

    Also returns the SNR in dB of the lowered graph's outputs against the `original` model's on the same `feeds`:
    the quantization error, where the original is not quantized.
    """
    with torch.no_grad():
        records = {
            name: linear_record(module, torch.from_numpy(probed[name].x), probed[name].rank)
            for name, module in modules.items()
        }
    optimized = target.engine == "onnxruntime"
    rows = [
        *_linear_rows(graphs.exported, "exported", records, folder, optimized=True),
        *_linear_rows(graphs.lowered, "lowered", records, folder, optimized=optimized),
    ]
    exported, moved = _run_exported(graphs.exported, [feeds, _all_shaken(feeds)])
    (lowered,) = run_graph(graphs.lowered, [dict(feeds)], optimized=optimized)
    quantization_db = outputs_snr_db(original, lowered)
    limits = [EXACT_DB, outputs_snr_db(exported, moved) - SENSITIVITY_MARGIN_DB]
    if any(record.activation_format != "none" for record in records.values()):
        limits.append(quantization_db + HEADROOM_DB)
    found, needed = bounded_db(outputs_snr_db(exported, lowered)), bounded_db(min(limits))
    rows.append(GateRow("lowered", "end_to_end", " ".join(original), found, needed, passed=found >= needed))
    note = "inputs were random numbers of the right types and shapes"
    return GateResult(tuple(rows), (), (note,)), quantization_db


def _run_exported(path: Path, feeds: Sequence[Arrays]) -> Sequence[Arrays]:
    """Run a graph with function bodies. Raises `FidelityError` where ONNX Runtime cannot."""
    try:
        # Folding would keep every intermediate result of decoding the weights, 14 times their size, until it ends.
        session = OnnxSession(path, fold_constants=False)
        outputs = [session.run(feed) for feed in feeds]
    except InputError as error:
        raise FidelityError(str(error)) from error
    del session
    return_freed_memory()
    return outputs


def _linear_rows(
    path: Path, stage: Stage, records: Mapping[str, LinearRecord], folder: Path, *, optimized: bool
) -> Sequence[GateRow]:
    model: onnx.ModelProto = untiled(read_model(path))
    cut = folder / f"linears.{stage}.onnx"
    try:
        return compare_linears(model, read_layer_table(model), records, stage, cut, optimized=optimized).rows
    except CutError as error:
        raise FidelityError(f"{path}: {error}") from error


def _all_shaken(feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
    return {name: _shaken(array) for name, array in feeds.items()}


def _shaken(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Floats with noise as small as rounding in their own type."""
    if array.dtype == np.float16:
        return np.asarray(np.nextafter(array, np.float16(np.inf)))
    if array.dtype != np.float32:
        return array
    noise = np.random.default_rng(0).standard_normal(array.shape)
    return np.asarray(array * (1 + INPUT_NOISE * noise), np.float32)


def outputs_snr_db(expected: Arrays, found: Arrays) -> float:
    """SNR in dB of the floating-point outputs, the worst of them; NaN where one is not finite.

    Raises `InputError` where none is floating point.
    """
    floating = {name: array.astype(np.float64) for name, array in expected.items() if array.dtype.kind == "f"}
    if not floating:
        given = ", ".join(f"{name} ({array.dtype})" for name, array in expected.items())
        raise InputError(
            f"the model's outputs are {given}: none is floating point, so none can be compared; "
            "add a floating-point output, or use --no-validate"
        )
    values = [
        power_ratio_db(float(np.sum(exact**2)), float(np.sum((exact - found[name].astype(np.float64)) ** 2)))
        for name, exact in floating.items()
    ]
    return float(np.min(values))
