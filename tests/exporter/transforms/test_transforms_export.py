"""Transformed layers through export, passes and gate; `test_families` has them in whole jobs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from torch import nn

from exporter.calibration.nearest import nearest_weight
from exporter.errors import FidelityError
from exporter.gate.table import GateResult
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.passes.emulate import emulation_passes
from exporter.passes.layer_table import read_layer_table
from exporter.plan import LayerPlan, Plan
from exporter.progress import NullProgress
from exporter.quantize import quantize_model
from exporter.targets import TARGETS, Target
from exporter.to_onnx import to_onnx
from exporter.transforms.apply import find_low_rank, load_low_rank, save_low_rank, with_transforms
from exporter.validate import captured_batches, validate_graphs
from tests.exporter.validated_export import ADAPTER, TOKENS, captured_inputs, tiny_pixart, two_prompts

RANK = 4
# q, k and v read one input, the feed-forward layers are what fusions and tiles look for.
ROTATED = {"attn1.to_q": 16, "attn1.to_k": 16, "attn1.to_v": 16, "ff.net.2": 64}
BRANCHED = ("attn1.to_v", "attn1.to_out.0", "ff.net.0.proj")
BLOCK = "transformer_blocks.0"
CPU, PLUGINS = TARGETS["cpu"], TARGETS["orin"].with_kernels("plugin")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Traced:
    """The transformed model, the same quantized, and its traced graph."""

    original: nn.Module
    quantized: nn.Module
    path: Path

    def lowered(self, target: Target) -> tuple[onnx.ModelProto, onnx.ModelProto]:
        """The waist, and what becomes of it, as ONNX Runtime can run it."""
        exported, _ = run_passes(onnx.load(self.path), WAIST_PASSES, target)
        passes = (*lowering_passes(target), *emulation_passes(target))
        return exported, run_passes(exported, passes, target)[0]

    def gate(self, target: Target, folder: Path, lowered: onnx.ModelProto | None = None) -> GateResult:
        """The gate's result on both graphs, or on another lowered one."""
        exported, own = self.lowered(target)
        onnx.save(exported, folder / "exported.onnx")
        onnx.save(own if lowered is None else lowered, folder / "lowered.onnx")
        batches = captured_batches(captured_inputs(), two_prompts())
        paths = (folder / "exported.onnx", folder / "lowered.onnx", folder / "gate")
        return validate_graphs(self.original, self.quantized, ADAPTER, batches, *paths, target, NullProgress())[0]


def _layers(model: nn.Module) -> list[LayerPlan]:
    layers = []
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name.startswith(BLOCK):
            short = name.split(".", 2)[2]
            size, rank = ROTATED.get(short, 0), RANK * (short in BRANCHED)
            n, k = linear.weight.shape
            path = f"{name}.linear" if size or rank else name
            formats = ("e2m1", "e2m3", 32, "foldable", "int8", "auto")
            layers.append(LayerPlan(path, n, k, True, *formats, rank, size))
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
