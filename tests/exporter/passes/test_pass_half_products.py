"""Products with FP16 results: sums of integers stay exact, only they are rounded, and nothing overflows."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from exporter.errors import InputError
from exporter.passes import TENSORRT_PASSES, WAIST_PASSES, lowering_passes, run_passes
from exporter.passes.emulate import emulation_passes
from exporter.passes.half_products import multiply_in_fp16, split_by_bound, split_by_scale
from exporter.passes.layer_table import read_layer_table
from exporter.passes.lower_tensorrt import lower_to_tensorrt
from exporter.targets import TARGETS
from plugins.float_quantize.reference import quantize_online
from plugins.formats import Values, get_format
from tests.exporter.passes.test_lower_cpu import hard_tokens
from tests.exporter.passes.waist_graphs import (
    WaistGraph,
    Weight,
    make_weight,
    one_linear,
    op_types,
    reference,
    run,
    snr_db,
    tokens,
)

TURING = TARGETS["rtx-sm75"]
# Half the distance of neighbours, relative to a number in the normal range.
ROUNDING = 2.0**-11
CASES = pytest.mark.parametrize(
    ("weight_format", "kind", "activation_format"),
    [
        ("e2m1", "foldable", "e2m3"),
        ("e3m0", "channel", "e2m3"),
        ("e2m1", "foldable", "int8"),
        ("int8", "channel", "int8"),
        ("e2m1", "foldable", "none"),
        ("e1m2", "channel", "none"),
    ],
)


def weight_of(weight_format: str, kind: str, *, bias: bool = True) -> Weight:
    return make_weight("fc", weight_format, 0 if kind == "channel" else 16, kind, bias=bias)


def lower(model: onnx.ModelProto) -> onnx.ModelProto:
    """Everything that the command's passes do with `compute: fp16`."""
    waist, _ = run_passes(model, WAIST_PASSES, TURING)
    return run_passes(waist, lowering_passes(TURING, "fp16"), TURING)[0]


def emulate(lowered: onnx.ModelProto) -> onnx.ModelProto:
    return run_passes(lowered, emulation_passes(TURING), TURING)[0]


def fp16_tokens() -> Values:
    """Numbers that an FP16 model hands to a linear."""
    return tokens().astype(np.float16).astype(np.float32)


@CASES
@pytest.mark.parametrize("bias", [True, False])
def test_only_the_product_is_rounded_and_only_once(
    weight_format: str, kind: str, activation_format: str, bias: bool
) -> None:
    weight = weight_of(weight_format, kind, bias=bias)
    model, x = emulate(lower(one_linear(weight, activation_format))), fp16_tokens()
    expected = reference(x, weight, activation_format)[1].astype(np.float64)
    offset = 0 if weight.bias is None else weight.bias.astype(np.float64)
    # A little for float32's own scales and sums; weight-only products of tiny tokens are not normal numbers.
    least = 2.0**-23 if activation_format == "none" else 0
    allowed = np.abs(expected - offset) * ROUNDING + np.abs(expected) * 2**-20 + least
    (entry,) = read_layer_table(model)
    found = run(model, x, entry.output)[-1].astype(np.float64)
    deviation = np.abs(found - expected)
    assert (deviation <= allowed).all()
    assert deviation.max() > 0
    assert 65 < snr_db(expected - offset, found - offset) < 85


@CASES
def test_every_product_is_fp16_and_no_more_than_that(weight_format: str, kind: str, activation_format: str) -> None:
    lowered = lower(one_linear(weight_of(weight_format, kind), activation_format))
    types = {info.name: info.type.tensor_type.elem_type for info in lowered.graph.value_info}
    assert [types[node.output[0]] for node in lowered.graph.node if node.op_type == "MatMul"] == [TensorProto.FLOAT16]
    stored = {tensor.name: tensor for tensor in lowered.graph.initializer}
    assert stored["fc.int8"].data_type == TensorProto.INT8
    inside = numpy_helper.to_array(stored["fc.row_scales.inside"])
    assert inside.dtype == np.float16
    assert (np.frexp(inside.astype(np.float64))[0] == 0.5).all()
    assert stored["fc.row_scales.outside"].data_type == TensorProto.FLOAT


def test_codes_are_the_ones_of_other_targets() -> None:
    lowered = lower(one_linear(make_weight("fc")))
    (entry,) = read_layer_table(lowered)
    x = hard_tokens("e2m3")
    (_, values) = run(emulate(lowered), x, entry.values)
    assert np.array_equal(entry.decode_values(values), quantize_online(x, get_format("e2m3"))[0])


@pytest.mark.parametrize("count", [64, 4608])
def test_the_largest_possible_sum_is_finite(count: int) -> None:
    """Every weight and every activation at its largest, all of one sign."""
    fmt = get_format("int8")
    codes = np.full((2, count), fmt.encode(np.asarray(fmt.max, np.float32)), np.uint8)
    scales = np.asarray([[1e-3], [100.0]], np.float32)
    weight = Weight("fc", "int8", 0, codes, scales, None)
    model, x = emulate(lower(one_linear(weight, "int8"))), np.full((1, 5, count), 3.0, np.float32)
    y = run(model, x)[0]
    expected = count * 3.0 * fmt.max * scales[:, 0]
    # The second row's result is beyond FP16 itself: its product is not.
    (entry,) = read_layer_table(model)
    exact = run(model, x, entry.output)[-1]
    assert np.allclose(exact, expected, rtol=ROUNDING)
    assert np.isfinite(y[..., 0]).all()


def test_layers_that_share_an_activation_share_its_half() -> None:
    waist = WaistGraph()
    outputs = [waist.linear("x", make_weight(name)) for name in ("a", "b")]
    lowered = lower(waist.model(*outputs))
    assert op_types(lowered).count("QuantizeLinear") == 1
    assert op_types(lowered).count("DequantizeLinear") == 3
    waist = WaistGraph()
    outputs = [waist.linear("x", make_weight(name), "none") for name in ("a", "b")]
    inputs = [node.input[0] for node in lower(waist.model(*outputs)).graph.node if node.op_type == "MatMul"]
    assert inputs[0] == inputs[1]


@pytest.mark.parametrize("target", [name for name in TARGETS if name not in ("cpu", "rtx-sm75")])
def test_other_targets_keep_fp32_products(target: str) -> None:
    assert lowering_passes(TARGETS[target]) == TENSORRT_PASSES
    waist, _ = run_passes(one_linear(make_weight("fc")), WAIST_PASSES, TARGETS[target])
    _, results = run_passes(waist, (lower_to_tensorrt, multiply_in_fp16), TARGETS[target])
    assert results[-1].changed == 0


def test_other_products_are_left_alone() -> None:
    waist = WaistGraph()
    plain = waist.node("MatMul", "x", waist.constant("w", np.ones((64, 64), np.float32)), output="plain")
    waist.constant("int8", np.ones((64, 64), np.int8))
    waist.constant("tensor_scale", np.float32(0.5))
    decoded = waist.node("DequantizeLinear", "int8", "tensor_scale", output="decoded")
    y = waist.node("MatMul", plain, decoded, output="y")
    _, (result,) = run_passes(waist.model(y), (multiply_in_fp16,), TURING)
    assert result.changed == 0


def test_numbers_dequantized_with_another_scale_are_taken_as_they_are() -> None:
    waist = WaistGraph()
    for name, array in (("s", np.float32(0.1)), ("z", np.int8(0)), ("w", np.ones((64, 8), np.int8))):
        waist.constant(name, array)
    waist.constant("fc.row_scales", np.full(8, 0.01, np.float32))
    codes = waist.node("QuantizeLinear", "x", "s", "z", output="codes")
    x = waist.node("DequantizeLinear", codes, "s", "z", output="x_hat")
    decoded = waist.node("DequantizeLinear", "w", "fc.row_scales", output="decoded", axis=1)
    model = waist.model(waist.node("MatMul", x, decoded, output="y"))
    changed, (result,) = run_passes(model, (multiply_in_fp16,), TURING)
    assert result.changed == 1
    (matmul,) = (node for node in changed.graph.node if node.op_type == "MatMul")
    (source,) = (node for node in changed.graph.node if matmul.input[0] in node.output)
    assert (source.op_type, list(source.input)) == ("Cast", ["x_hat"])
    assert snr_db(run(model, tokens())[0], run(emulate(changed), tokens())[0]) > 40


def test_scales_are_split_without_a_loss() -> None:
    scales = np.asarray([1e-3, 0.75, 1.0, 2.0**-20, 1e6], np.float32)
    split = split_by_scale(scales)
    assert np.array_equal(split.inside.astype(np.float64) * split.outside, scales.astype(np.float64))
    assert split.inside.tolist() == [2.0**-10, 0.5, 1.0, 2.0**-14, 2.0**8]
    assert (split.outside[:3] >= 1).all()
    assert (split.outside[:3] < 2).all()


def test_a_bound_leaves_room_for_every_sum_but_wastes_no_more_than_a_bit() -> None:
    weights = np.zeros((4608, 3), np.int8)
    weights[:, 1], weights[0, 2] = -127, 1
    split = split_by_bound("fc", weights, np.ones(3, np.float32))
    sums = np.abs(weights.astype(np.float64)).sum(axis=0) * 128 * split.inside
    assert (sums <= 65504).all()
    assert sums[1] > 65504 / 2
    assert split.inside.tolist() == [1.0, 2.0**-11, 1.0]
    assert np.array_equal(split.inside * split.outside, np.ones(3))


def test_sums_too_long_for_fp16_are_refused_by_the_layer_s_name() -> None:
    with pytest.raises(InputError, match=r"^blocks\.0\.fc: sums of 131072 products.*weight: none"):
        split_by_bound("blocks.0.fc", np.full((131072, 1), 127, np.int8), np.ones(1, np.float32))
