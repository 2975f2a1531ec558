"""What becomes one low-bit linear, what must not, and which names are left behind."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from exporter.passes import fuse_linear, run_passes, share_activation_quantizers
from exporter.passes.layer_table import read_layer_table
from exporter.targets import TARGETS
from plugins.op import Gemm
from tests.exporter.passes.waist_graphs import (
    WaistGraph,
    Weight,
    make_weight,
    one_linear,
    op_types,
    run,
    snr_db,
    tokens,
)

CPU = TARGETS["cpu"]


def _fuse(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    fused, (result,) = run_passes(model, (fuse_linear,), CPU)
    return fused, result.changed


def _same(before: onnx.ModelProto, after: onnx.ModelProto, x: np.ndarray | None = None) -> None:
    x = tokens() if x is None else x
    for old, new in zip(run(before, x), run(after, x), strict=True):
        assert snr_db(old, new) > 120


@pytest.mark.parametrize("kind", ["channel", "group"])
@pytest.mark.parametrize("activation_format", ["e2m3", "e4m3", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_chain_becomes_one_node(kind: str, activation_format: str, bias: bool) -> None:
    weight = make_weight("blocks.0.fc", group_size=0 if kind == "channel" else 16, kind=kind, bias=bias)
    before = one_linear(weight, activation_format)
    after, changed = _fuse(before)
    assert changed == 1
    gemm = Gemm("e2m1", activation_format, weight.group_size, 64, has_multipliers=False, packed=False, has_bias=bias)
    quantizer = [] if activation_format == "none" else [f"FloatQuantizeOnline_{activation_format}"]
    assert op_types(after) == [*quantizer, gemm.op_type]
    _same(before, after)


def test_names_lead_back_to_the_layer() -> None:
    waist = WaistGraph()
    hidden = waist.node("Abs", "x", output="hidden")
    outputs = [waist.linear(hidden, make_weight(name)) for name in ("q", "k")]
    total = waist.node("Add", *outputs, output="total")
    model, _ = run_passes(waist.model(total), (share_activation_quantizers, fuse_linear), CPU)
    first, second = read_layer_table(model)
    assert (first.layer, second.layer) == ("q", "k")
    assert (first.input, first.values, first.output) == ("q.input", "q.values", "q.output")
    assert (second.input, second.values, second.output) == ("q.input", "q.values", "k.output")
    assert (first.in_features, first.out_features, first.encoding) == (64, 24, "float32")
    probed = run(model, tokens(), "q.input", "q.values", "k.output")
    assert np.array_equal(probed[1], np.abs(tokens()))


def test_graph_inputs_and_outputs_keep_their_names() -> None:
    model, _ = _fuse(one_linear(make_weight("fc")))
    (entry,) = read_layer_table(model)
    assert (entry.input, entry.output) == ("x", "fc/y")


def _gemm_form(weight: Weight, *, transposed: bool, **attributes: float) -> onnx.ModelProto:
    waist = WaistGraph(weight.count)
    flat = waist.node("Reshape", "x", waist.constant("flat", np.array([-1, weight.count], np.int64)), output="x2")
    x_hat = waist.quantized(flat, weight.layer, "e2m3")
    w = waist.weight(weight)
    if transposed:
        w = waist.node("Transpose", w, output="wt", perm=[1, 0])
    operands = [x_hat, w] + ([] if weight.bias is None else [waist.constant("fc.bias", weight.bias)])
    waist.node("Gemm", *operands, output="y", **attributes)
    return waist.model("y", rank=2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("transposed", "attributes"), [(False, {"transB": 1}), (True, {}), (True, {"transB": 0})])
def test_gemm_operator_is_fused(bias: bool, transposed: bool, attributes: dict[str, int]) -> None:
    before = _gemm_form(make_weight("fc", bias=bias), transposed=transposed, **attributes)
    after, changed = _fuse(before)
    assert changed == 1
    assert op_types(after)[1:] == ["FloatQuantizeOnline_e2m3", f"FloatGemm_e2m1_e2m3_g16_k64{'_bias' * bias}"]
    _same(before, after)


@pytest.mark.parametrize("attributes", [{"transB": 1, "alpha": 0.5}, {"transB": 1, "beta": 2.0}])
def test_gemm_that_scales_is_not_fused(attributes: dict[str, float]) -> None:
    before = _gemm_form(make_weight("fc"), transposed=False, **attributes)
    after, changed = _fuse(before)
    assert changed == 0
    assert op_types(after) == op_types(before)


def test_product_over_the_other_axis_is_not_fused() -> None:
    weight = make_weight("fc", features=64)
    waist = WaistGraph()
    y = waist.node("MatMul", waist.quantized("x", "fc", "e2m3"), waist.weight(weight), output="y")
    assert _fuse(waist.model(y))[1] == 0


def test_weight_on_the_left_is_not_fused() -> None:
    waist = WaistGraph(64)
    transposed = waist.node("Transpose", waist.weight(make_weight("fc", features=5)), output="wt", perm=[1, 0])
    y = waist.node("MatMul", transposed, "x", output="y")
    assert _fuse(waist.model(y))[1] == 0


def test_weight_with_another_reader_is_not_fused() -> None:
    waist = WaistGraph()
    y = waist.linear("x", make_weight("fc"))
    largest = waist.node("ReduceMax", "fc/w", output="largest", keepdims=0)
    assert _fuse(waist.model(waist.node("Add", y, largest, output="y")))[1] == 0


def test_weight_that_is_an_output_is_not_fused() -> None:
    waist = WaistGraph()
    waist.linear("x", make_weight("fc"))
    model = waist.model("fc/y")
    model.graph.output.append(onnx.helper.make_tensor_value_info("fc/w", onnx.TensorProto.FLOAT, [24, 64]))
    assert _fuse(model)[1] == 0


def test_bias_stays_outside_when_the_product_is_needed_too() -> None:
    waist = WaistGraph()
    waist.linear("x", make_weight("fc"))
    waist.node("Neg", "fc/mm", output="other")
    before = waist.model("fc/y", "other")
    after, changed = _fuse(before)
    assert changed == 1
    assert op_types(after) == ["FloatQuantizeOnline_e2m3", "FloatGemm_e2m1_e2m3_g16_k64", "Add", "Neg"]
    _same(before, after)


def test_sum_with_something_else_is_no_bias() -> None:
    waist = WaistGraph()
    y = waist.linear("x", make_weight("fc", features=64, bias=False))
    before = waist.model(waist.node("Add", y, "x", output="y"))
    after, changed = _fuse(before)
    assert changed == 1
    assert op_types(after)[-1] == "Add"
    _same(before, after)


def test_dequantized_activation_that_is_read_elsewhere_stays() -> None:
    waist = WaistGraph()
    y = waist.linear("x", make_weight("fc"))
    waist.node("Neg", "fc/x_hat", output="other")
    before = waist.model(y, "other")
    after, changed = _fuse(before)
    assert changed == 1
    assert "FloatDequantize_values" in op_types(after)
    _same(before, after)


def test_running_twice_changes_nothing_more() -> None:
    once, _ = _fuse(one_linear(make_weight("fc")))
    twice, changed = _fuse(once)
    assert changed == 0
    assert read_layer_table(twice) == read_layer_table(once)
