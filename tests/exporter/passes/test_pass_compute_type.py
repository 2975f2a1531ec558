"""FP16 and BF16 around the quantized linears: where Casts stand, what stays FP32, and what is refused."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from exporter.compute import COMPUTE_TYPES, Compute
from exporter.errors import InputError
from exporter.passes import COMPUTE_PASSES, WAIST_PASSES, lowering_passes, run_passes
from exporter.passes.emulate import emulation_passes
from exporter.passes.layer_table import read_layer_table
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import WaistGraph, make_weight, op_types, run, tokens

RTX = TARGETS["rtx-sm89"]
TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
BOTH = pytest.mark.parametrize("compute", ["fp16", "bf16"])


def _block(bias: bool = True) -> onnx.ModelProto:
    """A modulated norm, two linears that share a quantizer, a residual, and a linear in high precision."""
    waist = WaistGraph()
    normed = waist.node("LayerNormalization", "x", waist.constant("ones", np.ones(64, np.float32)), output="normed")
    scale = waist.constant("scale", np.full(64, 1 / 3, np.float32))
    normed = waist.node("Mul", normed, scale, output="modulated")
    q, k = (waist.linear(normed, make_weight(f"blocks.0.{name}", features=64, bias=bias)) for name in ("q", "k"))
    mixed = waist.node("Add", waist.node("Mul", q, k, output="product"), "x", output="mixed")
    rng = np.random.default_rng(0)
    weight = waist.constant("proj.weight", rng.standard_normal((64, 8)).astype(np.float32))
    return waist.model(waist.node("MatMul", mixed, weight, output="y"))


def _lowered(model: onnx.ModelProto, compute: Compute) -> onnx.ModelProto:
    waist, _ = run_passes(model, WAIST_PASSES, RTX)
    return run_passes(waist, lowering_passes(RTX, compute), RTX)[0]


def _types(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    inferred = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return inferred | {tensor.name: tensor.data_type for tensor in graph.initializer}


@BOTH
def test_one_cast_at_the_entry_and_one_at_the_exit(compute: Compute) -> None:
    model = _lowered(_block(), compute)
    assert Counter(op_types(model))["Cast"] == 1 + 1 + 1 + 2 + 1  # input; norm; shared quantizer; two linears; output
    producers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type == "Cast":
            assert node.input[0] not in producers or producers[node.input[0]].op_type != "Cast"
    (quantized,) = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    readers = [node for node in model.graph.node if quantized.output[0] in node.input]
    assert [node.op_type for node in readers] == ["DequantizeLinear"]


@BOTH
def test_types(compute: Compute) -> None:
    model = _lowered(_block(), compute)
    types = _types(model)
    assert (types["x"], types["y"]) == (TensorProto.FLOAT, TensorProto.FLOAT)
    for name in ("scale", "proj.weight", "blocks.0.q.input", "product", "mixed"):
        assert types[name] == TYPES[compute], name
    for name in (
        "ones",
        "normed",
        "blocks.0.q.bias",
        "blocks.0.q.row_scales",
        "blocks.0.q.token_scales",
        "blocks.0.q.output",
    ):
        assert types[name] == TensorProto.FLOAT, name
    onnx.checker.check_model(model, full_check=True)


@BOTH
def test_quantized_linears_compute_what_they_did(compute: Compute) -> None:
    """Given the same inputs, codes and FP32 outputs are bit for bit those of the FP32 graph."""
    waist = WaistGraph()
    model = waist.model(waist.node("Neg", waist.linear("x", make_weight("fc")), output="y"))
    emulated, _ = run_passes(_lowered(model, compute), emulation_passes(RTX), RTX)
    plain = _lowered(model, "fp32")
    (entry,) = read_layer_table(emulated)
    x = COMPUTE_TYPES[compute].rounded(tokens())
    y, codes, inside = run(emulated, x, entry.values, entry.output)
    _, expected_codes, expected = run(plain, x, entry.values, entry.output)
    assert np.array_equal(codes, expected_codes)
    assert np.array_equal(inside, expected)
    assert np.array_equal(y, -COMPUTE_TYPES[compute].rounded(expected))


@BOTH
def test_sinusoids_stay_fp32_up_to_the_first_linear(compute: Compute) -> None:
    waist = WaistGraph()
    angle = waist.node("Mul", "x", waist.constant("frequencies", np.full(64, 1e-7, np.float32)), output="angle")
    both = waist.node(
        "Concat", waist.node("Sin", angle, output="s"), waist.node("Cos", angle, output="c"), output="both", axis=-1
    )
    weight = waist.constant("weight", np.ones((128, 4), np.float32))
    model = waist.model(waist.node("Relu", waist.node("MatMul", both, weight, output="mm"), output="y"))
    lowered, _ = run_passes(model, COMPUTE_PASSES[compute], RTX)
    types = _types(lowered)
    assert {types[name] for name in ("frequencies", "angle", "s", "c", "both")} == {TensorProto.FLOAT}
    assert types["weight"] == types["mm"] == TYPES[compute]
    assert op_types(lowered).count("Cast") == 2


def test_operators_that_the_standard_lacks_in_the_type_stay() -> None:
    """Conv takes BFLOAT16 from opset 22 on; these graphs are opset 21."""
    waist = WaistGraph()
    kernel = waist.constant("kernel", np.ones((5, 5, 1), np.float32))
    model = waist.model(waist.node("Conv", "x", kernel, output="y"))
    assert run_passes(model, COMPUTE_PASSES["bf16"], RTX)[1][0].changed == 0
    assert run_passes(model, COMPUTE_PASSES["fp16"], RTX)[1][0].changed == 1


@pytest.mark.parametrize(
    ("compute", "values", "message"),
    [
        ("fp16", -3.0e38, r"constant 'c', which Mul 'y_node' reads, holds 3e\+38, beyond fp16's.*65504.*compute: bf16"),
        ("fp16", [1.0, 65520.0], "holds 65520"),
        ("bf16", -3.4028235e38, "beyond bf16's.*use `compute: fp32`"),
        ("fp16", 1e-6, "is 1e-06, below fp16's smallest normal number"),
    ],
)
def test_a_constant_that_the_type_does_not_hold_is_refused_by_name(
    compute: Compute, values: float | list[float], message: str
) -> None:
    waist = WaistGraph(2)
    model = waist.model(waist.node("Mul", "x", waist.constant("c", np.float32(values)), output="y"))
    with pytest.raises(InputError, match=message):
        run_passes(model, COMPUTE_PASSES[compute], RTX)


@pytest.mark.parametrize("values", [0.0, -10000.0, [1.0, 1e-6], -np.inf, 65519.0])
def test_constants_that_it_holds_well_enough_are_stored(values: float | list[float]) -> None:
    waist = WaistGraph(2)
    model = waist.model(waist.node("Max", "x", waist.constant("c", np.float32(values)), output="y"))
    lowered, _ = run_passes(model, COMPUTE_PASSES["fp16"], RTX)
    (stored,) = [numpy_helper.to_array(tensor) for tensor in lowered.graph.initializer]
    assert stored.dtype == np.float16


def test_a_constant_that_a_sinusoid_reads_too_keeps_an_fp32_twin() -> None:
    waist = WaistGraph()
    factor = waist.constant("factor", np.float32(1 / 3))
    wave = waist.node("Sin", waist.node("Mul", "x", factor, output="a"), output="s")
    weight = waist.constant("w", np.ones((64, 4), np.float32))
    model = waist.model(waist.node("Mul", waist.node("MatMul", wave, weight, output="m"), factor, output="y"))
    lowered, _ = run_passes(model, COMPUTE_PASSES["fp16"], RTX)
    types = _types(lowered)
    assert (types["factor"], types["factor.fp16"]) == (TensorProto.FLOAT, TensorProto.FLOAT16)


@BOTH
def test_it_does_nothing_to_a_graph_of_quantized_linears_only_or_one_that_is_low_already(compute: Compute) -> None:
    waist = WaistGraph()
    linear, _ = run_passes(waist.model(waist.linear("x", make_weight("fc"))), WAIST_PASSES, RTX)
    assert run_passes(linear, COMPUTE_PASSES[compute], RTX)[1][0].changed == 0
    once = _lowered(_block(), compute)
    again, results = run_passes(once, COMPUTE_PASSES[compute], RTX)
    assert results[0].changed == 0
    assert op_types(again) == op_types(once)


def test_a_tensor_of_unknown_type_is_an_error_and_not_left_out() -> None:
    """A Squeeze that torch wrote and no runtime takes: nothing behind it has a type."""
    waist = WaistGraph()
    wide = waist.node("Squeeze", waist.node("Abs", "x", output="a"), waist.constant("i", np.array([1])), output="s")
    model = waist.model(waist.node("Neg", waist.node("Abs", wide, output="b"), output="y"))
    with pytest.raises(ValueError, match="the type of tensor 's' is not known"):
        run_passes(model, COMPUTE_PASSES["fp16"], RTX)
