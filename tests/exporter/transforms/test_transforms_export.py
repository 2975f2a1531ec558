"""Transformed layers through export, passes and gate; `test_families` has them in whole jobs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from torch import nn

from exporter.calibration.nearest import nearest_weight
from exporter.compute import Compute
from exporter.errors import FidelityError
from exporter.gate.table import GateResult
from exporter.inspection.report import inspect_path
from exporter.layer_entries import OUTPUTS_KEY
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.passes.emulate import emulation_passes
from exporter.passes.layer_table import read_layer_table, read_output_table
from exporter.plan import LayerPlan, Plan
from exporter.progress import NullProgress
from exporter.quantize import quantize_model
from exporter.targets import TARGETS, Target
from exporter.to_onnx import to_onnx
from exporter.transforms.apply import find_low_rank, load_low_rank, save_low_rank, with_transforms
from exporter.validate import captured_batches, validate_graphs
from tests.exporter.validated_export import ADAPTER, TOKENS, WIDTH, captured_inputs, tiny_pixart, two_prompts

RANK = 4
# q, k and v read one input, the feed-forward layers are what fusions and tiles look for.
ROTATED = {"attn1.to_q": 16, "attn1.to_k": 16, "attn1.to_v": 16, "ff.net.2": 64}
BRANCHED = ("attn1.to_v", "attn1.to_out.0", "ff.net.0.proj")
# What attention reads, per token and head or per token, in a format for every way in which targets round.
HEAD = WIDTH // 2
ROUNDED = {
    "attn1.to_q": ("e4m3", HEAD),
    "attn1.to_k": ("int8", 0),
    "attn1.to_v": ("e3m4", HEAD),
    "attn2.to_q": ("e2m3", 0),
}
BLOCK = "transformer_blocks.0"
CPU, PLUGINS = TARGETS["cpu"], TARGETS["orin"].with_kernels("plugin")
ADA, TURING = TARGETS["rtx-sm89"], TARGETS["rtx-sm75"]

pytestmark = pytest.mark.slow


def compute_of(target: Target) -> Compute:
    """FP16 where results pass from it to a quantizer and back."""
    return "fp16" if target == TURING else "fp32"


@dataclass(frozen=True)
class Traced:
    """The transformed model, the same quantized, and its traced graph."""

    original: nn.Module
    quantized: nn.Module
    path: Path

    def lowered(self, target: Target) -> tuple[onnx.ModelProto, onnx.ModelProto]:
        """The waist, and what becomes of it, as ONNX Runtime can run it."""
        exported, _ = run_passes(onnx.load(self.path), WAIST_PASSES, target)
        passes = (*lowering_passes(target, compute_of(target)), *emulation_passes(target))
        return exported, run_passes(exported, passes, target)[0]

    def gate(
        self,
        target: Target,
        folder: Path,
        lowered: onnx.ModelProto | None = None,
        exported: onnx.ModelProto | None = None,
    ) -> GateResult:
        """The gate's result on both graphs, or on others."""
        waist, own = self.lowered(target)
        exported = waist if exported is None else exported
        onnx.save(exported, folder / "exported.onnx")
        onnx.save(own if lowered is None else lowered, folder / "lowered.onnx")
        batches = captured_batches(captured_inputs(), two_prompts())
        paths = (folder / "exported.onnx", folder / "lowered.onnx", folder / "gate")
        models, compute = (self.original, self.quantized, ADAPTER, batches), compute_of(target)
        return validate_graphs(*models, *paths, target, NullProgress(), compute)[0]


def _layers(model: nn.Module) -> list[LayerPlan]:
    layers = []
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name.startswith(BLOCK):
            short = name.split(".", 2)[2]
            size, rank = ROTATED.get(short, 0), RANK * (short in BRANCHED)
            n, k = linear.weight.shape
            result = ROUNDED.get(short, ("none", 0))
            path = f"{name}.linear" if size or rank or short in ROUNDED else name
            formats = ("e2m1", "e2m3", 32, "foldable", "int8", "auto")
            layers.append(LayerPlan(path, n, k, True, *formats, rank, size, *result))
    return layers


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    folder = tmp_path_factory.mktemp("transforms")
    model = tiny_pixart()
    model.transformer_blocks = model.transformer_blocks[:1]
    layers = _layers(model)
    ranks = {layer.original_name: layer.low_rank for layer in layers if layer.low_rank}
    save_low_rank(folder / "found.safetensors", find_low_rank(model, ranks, NullProgress()))
    changed = with_transforms(model, layers, load_low_rank(folder / "found.safetensors", ranks))
    weights = {
        layer.name: nearest_weight(changed.get_submodule(layer.name).weight, layer, None, "absmax") for layer in layers
    }
    quantized = quantize_model(changed, Plan(tuple(layers), (), 0, 0), weights)
    to_onnx(quantized, ADAPTER, ADAPTER.example_inputs(quantized, 2, TOKENS), folder / "traced.onnx")
    return Traced(changed, quantized, folder / "traced.onnx")


def _arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def _rotations(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    names = {name.removesuffix(".half") for name in _arrays(model) if ".rotation" in name}
    return [node for node in model.graph.node if {name.removesuffix(".full") for name in node.input} & names]


def test_plugins_take_up_a_branch_and_the_gate_holds_every_layer(traced: Traced, tmp_path: Path) -> None:
    exported, _ = traced.lowered(PLUGINS)
    lowered, _ = run_passes(exported, lowering_passes(PLUGINS), PLUGINS)
    plugins = {node.name: node.op_type for node in lowered.graph.node if node.op_type.startswith("PackedLinear")}
    assert len(plugins) == 10
    assert all("residual" in plugins[f"{BLOCK}.{short}.linear"] for short in BRANCHED)
    result = traced.gate(PLUGINS, tmp_path)
    names = [row.name for row in result.rows if (row.kind, row.stage) == ("linear", "lowered")]
    assert len(names) == len(plugins)
    assert {f"{BLOCK}.{short}.linear" for short in (*ROTATED, *BRANCHED)} <= set(names)
    assert_outputs_are_exact(result)


def assert_outputs_are_exact(result: GateResult) -> None:
    rows = [row for row in result.rows if row.kind == "output"]
    names = [f"{BLOCK}.{short}" for short in ROUNDED]
    assert [(row.stage, row.name) for row in rows] == [(stage, n) for stage in ("exported", "lowered") for n in names]
    assert all((row.snr_db, row.code_mismatches) == (200.0, 0) and row.code_count for row in rows)


@pytest.mark.parametrize("target", [ADA, TURING], ids=lambda target: target.name)
def test_outputs_are_rounded_in_a_container_that_rounds_alike_or_by_ordinary_operators(
    traced: Traced, tmp_path: Path, target: Target
) -> None:
    exported, _ = traced.lowered(target)
    lowered, _ = run_passes(exported, lowering_passes(target, compute_of(target)), target)
    made = {name: node for node in lowered.graph.node for name in node.output}
    types = {info.name: info.type.tensor_type.elem_type for info in lowered.graph.value_info}
    values = {short: types.get(f"{BLOCK}.{short}.quantizer.values") for short in ROUNDED}
    float8 = TensorProto.FLOAT8E4M3FN if target == ADA else None
    assert values == {"attn1.to_q": float8, "attn1.to_k": TensorProto.INT8, "attn1.to_v": None, "attn2.to_q": float8}
    assert not any(f"{BLOCK}.{short}.quantizer.values" in made for short in ROUNDED if values[short] is None)
    assert_outputs_are_exact(traced.gate(target, tmp_path))


def test_attention_on_a_cpu_stays_one_operator_each(traced: Traced) -> None:
    """Its inputs are what the quantizers give, by the names that the table has."""
    _, lowered = traced.lowered(CPU)
    read = {name for node in lowered.graph.node if node.op_type == "MultiHeadAttention" for name in node.input}
    assert sum(node.op_type == "MultiHeadAttention" for node in lowered.graph.node) == 2
    assert {entry.output for entry in read_output_table(lowered)} <= read


def test_a_quantizer_of_outputs_that_is_wrong_or_missing_is_named(traced: Traced, tmp_path: Path) -> None:
    """A largest value that is a little off, so that scales are; an output that is not rounded."""
    exported, lowered = traced.lowered(CPU)
    # By which scales are divided, and at which quotients are clipped.
    (largest,) = (tensor for tensor in lowered.graph.initializer if not tensor.dims and as_number(tensor) == 448.0)
    largest.CopyFrom(numpy_helper.from_array(np.float32(440.0), largest.name))
    with pytest.raises(FidelityError, match=rf"output {BLOCK}.attn1.to_q \(lowered graph\): .* codes differ"):
        traced.gate(CPU, tmp_path, lowered)
    for entry in exported.metadata_props:
        if entry.key == OUTPUTS_KEY:
            entry.value = json.dumps(json.loads(entry.value)[1:])
    with pytest.raises(
        FidelityError, match=rf"exported graph: the quantizer of {BLOCK}.attn1.to_q's output is missing"
    ):
        traced.gate(CPU, tmp_path, exported=exported)


def as_number(tensor: onnx.TensorProto) -> float:
    array = numpy_helper.to_array(tensor)
    return float(array) if array.dtype == np.float32 else 0.0


def test_inspection_names_the_formats_of_outputs(traced: Traced, tmp_path: Path) -> None:
    onnx.save(traced.lowered(CPU)[1], tmp_path / "lowered.onnx")
    for path in (traced.path, tmp_path / "lowered.onnx"):
        found = {view.layer: view.output for view in inspect_path(path).layers}
        assert found[f"{BLOCK}.attn1.to_q.linear"] == f"e4m3/{HEAD}"
        assert found[f"{BLOCK}.attn1.to_k.linear"] == "int8"
        assert found[f"{BLOCK}.attn2.to_k"] == "-"


def test_layers_that_read_the_same_input_share_rotation_and_quantizer(traced: Traced) -> None:
    exported, lowered = traced.lowered(CPU)
    for graph in (exported, lowered):
        products = [node for node in _rotations(graph) if node.op_type == "MatMul"]
        assert len(products) == 2, "q, k and v have one, the feed-forward one more"
    entries = {entry.layer: entry for entry in read_layer_table(exported)}
    q, k, v = (entries[f"{BLOCK}.attn1.to_{letter}.linear"] for letter in "qkv")
    assert q.values == k.values == v.values
    assert {q.input, k.input, v.input} == {f"{q.layer}.input"}


def test_a_file_stores_rotations_and_branches_in_half_of_the_bytes(traced: Traced) -> None:
    arrays = _arrays(traced.lowered(CPU)[1])
    shapes = Counter(array.shape for array in arrays.values() if array.dtype == np.float16)
    assert (shapes[(64, 64)], shapes[(RANK, 256)]) == (1, 1)
    branches = [array for array in arrays.values() if RANK in array.shape and array.nbytes >= 1024]
    assert all(array.dtype == np.float16 for array in branches)


@pytest.mark.parametrize("part", ["rotation", "branch"])
def test_a_fault_beside_the_quantized_layer_fails_its_block(traced: Traced, tmp_path: Path, part: str) -> None:
    """A row of a Hadamard matrix with the wrong sign; a branch twice as large."""
    _, lowered = traced.lowered(CPU)
    shape = (64, 64) if part == "rotation" else (RANK, 256)
    tensor = next(
        tensor
        for tensor in lowered.graph.initializer
        if tuple(tensor.dims) == shape and (".rotation" in tensor.name) == (part == "rotation")
    )
    changed = numpy_helper.to_array(tensor).copy()
    if part == "rotation":
        changed[3] *= -1
    else:
        changed *= 2
    tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    with pytest.raises(FidelityError, match=rf"block {BLOCK} \(lowered graph\)"):
        traced.gate(CPU, tmp_path, lowered)
