"""The TensorRT lowering, run in ONNX Runtime: values bit for bit, products as the reference's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from exporter.errors import InputError
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.passes.layer_table import LayerEntry, read_layer_table
from exporter.targets import TARGETS
from plugins.float_quantize.reference import quantize_online
from plugins.formats import get_format
from tests.exporter.passes.test_lower_cpu import hard_tokens
from tests.exporter.passes.waist_graphs import (
    WaistGraph,
    make_weight,
    one_linear,
    op_types,
    reference,
    run,
    snr_db,
    tokens,
)

CASES = [
    ("rtx-sm86", "e2m1", "foldable", "e2m3", "int8"),
    ("rtx-sm86", "e1m2", "channel", "e2m3", "int8"),
    ("rtx-sm86", "e2m1", "foldable", "e2m1", "int8"),
    ("rtx-sm86", "int8", "channel", "int8", "int8"),
    ("rtx-sm89", "e2m1", "channel", "e4m3", "fp8"),
    ("rtx-sm89", "e2m1", "foldable", "e4m3", "fp8"),
    ("rtx-sm89", "e4m3", "channel", "e4m3", "fp8"),
    ("rtx-sm89", "e4m3", "channel", "e2m3", "fp8"),
    ("rtx-sm89", "e2m3", "channel", "e3m2", "fp8"),
    ("rtx-sm120", "e3m2", "channel", "e4m3", "fp8"),
    ("rtx-sm86", "e2m1", "foldable", "none", "int8"),
    ("rtx-sm86", "e2m3", "channel", "none", "int8"),
    ("rtx-sm86", "e1m2", "group", "none", "int4"),
]


def _lower(model: onnx.ModelProto, target: str) -> tuple[onnx.ModelProto, tuple[LayerEntry, ...]]:
    waist, _ = run_passes(model, WAIST_PASSES, TARGETS[target])
    lowered, _ = run_passes(waist, lowering_passes(TARGETS[target]), TARGETS[target])
    onnx.checker.check_model(lowered, full_check=True)
    return lowered, read_layer_table(lowered)


@pytest.mark.parametrize(("target", "weight_format", "kind", "activation_format", "container"), CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_layer(target: str, weight_format: str, kind: str, activation_format: str, container: str, bias: bool) -> None:
    group_size = 0 if kind == "channel" else 16
    holds = "fp8" if container == "fp8" else "int8"
    weight = make_weight("fc", weight_format, group_size, kind, bias=bias, container=holds)
    lowered, (entry,) = _lower(one_linear(weight, activation_format), target)
    assert entry.container == container
    x = tokens()
    assert snr_db(reference(x, weight, activation_format)[1], run(lowered, x)[0]) > 110
    if activation_format == "none":
        return
    assert entry.encoding == container
    for values in (x, hard_tokens(activation_format)):
        expected, _ = quantize_online(values, get_format(activation_format))
        assert np.array_equal(entry.decode_values(run(lowered, values, entry.values)[1]), expected)


@pytest.mark.parametrize("activation_format", ["e2m3", "e4m3"])
def test_w4a6_in_fp8_is_quantized_by_one_operator(activation_format: str) -> None:
    weight = replace(make_weight("fc", container="fp8"), container="fp8")
    lowered, (entry,) = _lower(one_linear(weight, activation_format), "rtx-sm89")
    assert (entry.container, entry.encoding) == ("fp8", "fp8")
    assert op_types(lowered)[:6] == ["Abs", "ReduceMax", "Max", "Div", "Div", "QuantizeLinear"]
    expected, _ = quantize_online(hard_tokens(activation_format), get_format(activation_format))
    y, values = run(lowered, hard_tokens(activation_format), entry.values)
    assert np.array_equal(entry.decode_values(values), expected)
    assert snr_db(reference(hard_tokens(activation_format), weight, activation_format)[1], y) > 110


def test_multipliers_of_another_container_are_refused() -> None:
    weight = replace(make_weight("blocks.0.fc", seed=3), container="fp8")
    assert 7 in np.rint(weight.scales / weight.scales.min(axis=1, keepdims=True))
    with pytest.raises(InputError, match=r"blocks\.0\.fc.*group"):
        _lower(one_linear(weight), "rtx-sm89")


@pytest.mark.parametrize(("weight_format", "multiplier"), [("e3m0", 2), ("e2m0", 32)])
def test_a_largest_product_of_128_keeps_its_sign(weight_format: str, multiplier: int) -> None:
    """It is what one byte holds of negative numbers alone."""
    fmt = get_format(weight_format)
    assert fmt.max_numerator * multiplier == 128
    weight = make_weight("fc", weight_format, container="fp8")
    weight.codes[:, ::5] = fmt.encode(np.float32(fmt.max))
    weight.scales[:] = weight.scales[:, :1] * np.float32([1, multiplier, multiplier, 1])
    lowered, (entry,) = _lower(one_linear(replace(weight, container="fp8"), "e4m3"), "rtx-sm89")
    assert entry.container == "fp8"
    assert snr_db(reference(tokens(), weight, "e4m3")[1], run(lowered, tokens())[0]) > 110


def test_weights_are_constants_of_the_container() -> None:
    for target, weight_format, kind, activation_format, container in CASES:
        holds = "fp8" if container == "fp8" else "int8"
        weight = make_weight("fc", weight_format, 0 if kind == "channel" else 16, kind, container=holds)
        lowered, _ = _lower(one_linear(weight, activation_format), target)
        stored = next(t for t in lowered.graph.initializer if t.name == f"fc.{container}")
        expected = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN, "int4": TensorProto.INT4}[container]
        assert (stored.data_type, list(stored.dims)) == (expected, [64, 24])


def test_scales_of_quantizers_are_one_so_that_nothing_is_lost() -> None:
    lowered, _ = _lower(one_linear(make_weight("fc")), "rtx-sm86")
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in lowered.graph.initializer}
    quantizer = next(node for node in lowered.graph.node if node.op_type == "QuantizeLinear")
    assert constants[quantizer.input[1]] == 1.0
    assert "Sub" not in op_types(lowered)


def test_one_tensor_read_in_two_containers() -> None:
    waist = WaistGraph()
    weights = [make_weight("a"), make_weight("b", "e4m3", 0, "channel")]
    outputs = [waist.linear("x", weight) for weight in weights]
    lowered, entries = _lower(waist.model(*outputs), "rtx-sm89")
    assert [entry.container for entry in entries] == ["int8", "fp8"]
    for y, weight in zip(run(lowered, tokens()), weights, strict=True):
        assert snr_db(reference(tokens(), weight, "e2m3")[1], y) > 110


def test_scale_that_is_not_positive_is_refused() -> None:
    weight = make_weight("blocks.0.fc", group_size=0, kind="channel")
    weight.scales[5] = 0
    with pytest.raises(InputError, match=r"blocks\.0\.fc.*not positive"):
        _lower(one_linear(weight), "rtx-sm86")
