"""What a transformer block is made of, operator by operator, so that a node too many is seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from exporter.compute import Compute
from exporter.gate.subgraphs import GivenTensor, cut
from exporter.models.pixart import PixArtAdapter
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.passes.layer_table import read_layer_table
from exporter.plan import LayerPlan, Plan
from exporter.quantize import quantize_model, round_to_nearest
from exporter.targets import TARGETS, Target
from exporter.to_onnx import to_onnx
from plugins.formats import get_format

ADAPTER = PixArtAdapter()
BLOCK = "transformer_blocks.1"
BEFORE = "transformer_blocks.0.output"

# Two attentions of two products each; queries, keys and values are split into heads, each by one Reshape and one
# Transpose (the keys' being that of the product, too), and the result is merged by another pair. One Mul per attention
# is its scale, the other four are modulations and gates; the Adds are the conditioning's table, two shifts, three
# residuals and the mask.
GLUE = Counter(
    {
        "Reshape": 8,
        "Transpose": 8,
        "MatMul": 4,
        "Mul": 2 + 4,
        "Softmax": 2,
        "Add": 1 + 2 + 3 + 1,
        "Split": 1,
        "LayerNormalization": 2,
        "Gelu": 1,
    }
)
# For ONNX Runtime an attention is one operator, its heads, scale and mask included.
CPU_GLUE = Counter({"MultiHeadAttention": 2, "Mul": 4, "Add": 6, "Split": 1, "LayerNormalization": 2, "Gelu": 1})
# The caption's quantizer is shared by all blocks, so that it counts with the first.
QUANTIZERS, LINEARS = 6, 10
QUANTIZER = Counter(
    {
        "Abs": 2,
        "ReduceMax": 1,
        "Max": 1,
        "Div": 3,
        "Less": 2,
        "Where": 2,
        "Round": 1,
        "Mul": 1,
        "QuantizeLinear": 1,
        "DequantizeLinear": 1,
    }
)
LINEAR = Counter({"DequantizeLinear": 1, "MatMul": 1, "Mul": 1, "Add": 1})


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    torch.manual_seed(0)
    model: nn.Module = PixArtTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        in_channels=2,
        out_channels=4,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    )
    model = model.eval().requires_grad_(False)
    layers, weights = [], {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name.startswith("transformer_blocks"):
            n, k = linear.weight.shape
            layers.append(LayerPlan(name, n, k, linear.bias is not None, "e2m1", "e2m3", 0, "channel", "int8"))
            weights[name] = round_to_nearest(linear.weight, linear.weight.abs().amax(1, True) / 6, get_format("e2m1"))
    quantized = quantize_model(model, Plan(tuple(layers), (), 0, 0), weights)
    path: Path = tmp_path_factory.mktemp("block") / "traced.onnx"
    to_onnx(quantized, ADAPTER, ADAPTER.example_inputs(quantized, 2, 5), path)
    return onnx.load(path)


def _block(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes between one block's output and the next one's, what all blocks share aside."""
    shared = ["blocks.timestep", "blocks.encoder_hidden_states", "blocks.encoder_attention_mask"]
    known = {name for node in model.graph.node for name in node.output}
    given = [GivenTensor(name, onnx.TensorProto.FLOAT, 3) for name in (BEFORE, *shared) if name in known]
    own = {node.name for node in cut(model, given, [f"{BLOCK}.output"]).graph.node}
    first = {node.name for node in cut(model, given[1:], [BEFORE]).graph.node}
    return [node for node in model.graph.node if node.name in own - first]


def _lowered(traced: onnx.ModelProto, target: Target, compute: Compute = "fp32") -> onnx.ModelProto:
    waist, _ = run_passes(traced, WAIST_PASSES, target)
    return run_passes(waist, lowering_passes(target, compute), target)[0]


def _operators(nodes: Iterable[onnx.NodeProto]) -> Counter[str]:
    return Counter(node.op_type.split("_")[0] for node in nodes)


def _times(count: int, counter: Counter[str]) -> Counter[str]:
    return Counter({name: count * each for name, each in counter.items()})


def test_the_waist(traced: onnx.ModelProto) -> None:
    waist, _ = run_passes(traced, WAIST_PASSES, TARGETS["cpu"])
    ours = {"FloatQuantizeOnline": QUANTIZERS, "FloatGemm": LINEARS}
    assert _operators(_block(waist)) == GLUE + Counter(ours)


def test_lowered_for_a_gpu(traced: onnx.ModelProto) -> None:
    lowered = _lowered(traced, TARGETS["rtx-sm89"])
    expected = GLUE + _times(QUANTIZERS, QUANTIZER) + _times(LINEARS, LINEAR)
    assert _operators(_block(lowered)) == expected


@pytest.mark.parametrize("compute", ["fp16", "bf16"])
def test_a_compute_type_adds_nothing_but_its_casts(traced: onnx.ModelProto, compute: Compute) -> None:
    lowered = _lowered(traced, TARGETS["rtx-sm89"], compute)
    # A norm, FP32 inside, has one on either side as well.
    casts = Counter({"Cast": QUANTIZERS + LINEARS + 2 * 2})
    expected = GLUE + _times(QUANTIZERS, QUANTIZER) + _times(LINEARS, LINEAR) + casts
    assert _operators(_block(lowered)) == expected


def test_lowered_for_the_cpu_an_attention_is_one_operator(traced: onnx.ModelProto) -> None:
    lowered = _lowered(traced, TARGETS["cpu"])
    layers = tuple(f"{entry.layer}." for entry in read_layer_table(lowered))
    assert _operators(node for node in _block(lowered) if not node.name.startswith(layers)) == CPU_GLUE


@pytest.mark.parametrize(
    ("target", "compute"), [("cpu", "fp32"), ("rtx-sm89", "fp32"), ("rtx-sm89", "fp16"), ("rtx-sm89", "bf16")]
)
def test_every_tuple_of_passes_is_idempotent(traced: onnx.ModelProto, target: str, compute: Compute) -> None:
    model = traced
    for passes in (WAIST_PASSES, lowering_passes(TARGETS[target], compute)):
        model, _ = run_passes(model, passes, TARGETS[target])
        again, results = run_passes(model, passes, TARGETS[target])
        assert {result.name: result.changed for result in results if result.changed} == {}
        assert [node.op_type for node in again.graph.node] == [node.op_type for node in model.graph.node]


def test_gelu_and_layer_normalization_are_one_node_each(traced: onnx.ModelProto) -> None:
    waist, _ = run_passes(traced, WAIST_PASSES, TARGETS["cpu"])
    nodes = {node.op_type: node for node in _block(waist)}
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in nodes["Gelu"].attribute}
    assert attributes["approximate"] == b"tanh"
    epsilon = {a.name: a.f for a in nodes["LayerNormalization"].attribute}["epsilon"]
    assert epsilon == np.float32(1e-6)
    assert not {"Erf", "Tanh", "Pow", "ReduceMean", "Sqrt", "Expand", "Shape", "Slice", "Identity"} & nodes.keys()
