"""Plugins read and write FP16 and BF16 themselves: no cast is left where both sides are of the type."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from exporter.compute import Compute
from exporter.layer_entries import read_layer_table
from tests.exporter.passes.plugins.plugin_graphs import PluginGraph, kinds, lowered, opened
from tests.exporter.passes.waist_graphs import make_weight, run, snr_db, tokens

FC = make_weight("fc", features=64)
TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
BOTH = pytest.mark.parametrize("compute", ["fp16", "bf16"])


def _block() -> onnx.ModelProto:
    """Two layers of a residual stream, the first behind a modulated norm, and something in the type around them."""
    graph = PluginGraph()
    x = graph.node("Neg", "x", output="stream")
    y = graph.linear(graph.modulated(x, graph.per_sample(x, "scale"), graph.per_sample(x, "shift")), FC)
    first = graph.node("Add", x, graph.node("Mul", graph.per_sample(x, "gate"), y, output="gated"), output="first")
    last = graph.node("Add", first, graph.linear(first, make_weight("second", features=64)), output="last")
    return graph.model(graph.node("Neg", last, output="result"))


def _types(model: onnx.ModelProto) -> dict[str, int]:
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {value.name: value.type.tensor_type.elem_type for value in values}


@BOTH
def test_every_float_of_a_plugin_is_of_the_type(compute: Compute) -> None:
    model = lowered(_block(), compute=compute)
    types = _types(model)
    for node in model.graph.node:
        if node.domain:
            assert f"_{compute}_" in node.op_type
            assert types[node.output[-1] if node.op_type.startswith("Packed") else node.input[0]] == TYPES[compute]
    # One at the graph's entry and one at its exit.
    assert kinds(model).count("Cast") == 2
    (first, second) = (node for node in model.graph.node if node.op_type.startswith("PackedLinear"))
    assert first.output[0] in second.input


@BOTH
def test_rounding_is_all_that_changes(compute: Compute) -> None:
    model = _block()
    (expected,) = run(model, tokens())
    (found,) = run(opened(lowered(model, compute=compute)), tokens())
    assert snr_db(expected, found) > {"fp16": 45, "bf16": 28}[compute]


@BOTH
def test_layers_are_fp32_inside(compute: Compute) -> None:
    """Given numbers of the type, a layer's result before it is rounded is that of FP32."""
    x = np.asarray(tokens(), np.float16).astype(np.float32)
    graph = PluginGraph()
    model = graph.model(graph.node("Neg", graph.linear(graph.node("Neg", "x", output="minus"), FC), output="y"))
    low = opened(lowered(model, compute=compute))
    (entry,) = read_layer_table(low)
    if compute == "bf16":
        x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    _, result = run(low, x, entry.output)
    (plain,) = run(model, x)
    assert snr_db(-plain, result) > 110


def test_what_others_need_in_fp32_is_cast_once() -> None:
    graph = PluginGraph()
    y = graph.linear("x", FC)
    ones = graph.constant("ones64", np.ones(64, np.float32))
    norms = [graph.node("LayerNormalization", y, ones, output=f"n{i}", axis=-1, epsilon=1e-3) for i in range(2)]
    model = graph.model(y, *norms)
    low = lowered(model, compute="fp16")
    assert _types(low)[y] == TensorProto.FLOAT
    wide = [node for node in low.graph.node if node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT]
    assert len(wide) == 1
    for expected, found in zip(run(model, tokens()), run(low, tokens()), strict=True):
        assert snr_db(expected, found) > 60
