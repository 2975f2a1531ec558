"""Waist → plugins: the same numbers bit for bit, packed weights, scales that took up every power of two."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from exporter.errors import InputError
from exporter.layer_entries import read_layer_table
from plugins.float_quantize.reference import quantize_online
from plugins.formats import get_format
from plugins.op import PackedLinear
from tests.exporter.passes.plugins.plugin_graphs import kinds, lowered
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
    ("orin", "e2m1", "foldable", "e2m3", "int8", "int8"),
    ("orin", "e2m1", "group", "e2m3", "int8", "int8"),
    ("orin", "e1m2", "channel", "e2m1", "int8", "int8"),
    ("orin", "e2m1", "foldable", "int8", "int8", "int8"),
    ("orin", "e2m1", "foldable", "e4m3", "fp16", "fp8_bytes"),
    ("orin", "e3m2", "channel", "e3m2", "fp16", "fp8_bytes"),
    ("orin", "e2m1", "group", "e4m3", "fp16", "fp8_bytes"),
    ("l4", "e2m1", "foldable", "e4m3", "fp8", "fp8"),
    ("h100", "e2m3", "group", "e4m3", "fp8", "fp8"),
    ("thor", "e3m2", "channel", "e2m3", "fp8", "fp8"),
]


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize(("target", "weight_format", "kind", "activation_format", "container", "encoding"), CASES)
def test_layer(
    target: str, weight_format: str, kind: str, activation_format: str, container: str, encoding: str
) -> None:
    weight = make_weight("fc", weight_format, 0 if kind == "channel" else 16, kind)
    model = lowered(one_linear(weight, activation_format), target)
    assert kinds(model) == ["TokenQuantize", "PackedLinear"]
    (entry,) = read_layer_table(model)
    assert (entry.container, entry.encoding) == (container, encoding)
    x = tokens()
    assert snr_db(reference(x, weight, activation_format)[1], run(model, x)[0]) > 110
    for values in (x, hard_tokens(activation_format)):
        expected, scales = quantize_online(values, get_format(activation_format))
        _, numbers, token_scales = run(model, values, entry.values, entry.token_scales)
        assert np.array_equal(entry.decode_values(numbers), expected)
        assert np.array_equal(token_scales, scales)


@pytest.mark.parametrize(("target", "weight_format", "kind", "activation_format", "container", "encoding"), CASES)
def test_weights_are_packed_and_scales_are_the_waists_times_a_power_of_two(
    target: str, weight_format: str, kind: str, activation_format: str, container: str, encoding: str
) -> None:
    weight = make_weight("fc", weight_format, 0 if kind == "channel" else 16, kind)
    model = lowered(one_linear(weight, activation_format), target)
    arrays = constants(model)
    variant = PackedLinear.parse(op_types(model)[1])
    assert variant is not None
    values = get_format(weight_format).decode(weight.codes)
    assert np.array_equal(get_format(weight_format).decode(variant.layout.unpack(arrays["fc.packed"])), values)
    scales = arrays["fc.sum_scales"]
    if kind == "foldable":
        scales = scales * arrays["fc.factors"].astype(np.float32)
    mantissas, exponents = np.frexp(scales / weight.scales)
    assert set(mantissas.ravel()) == {0.5}
    assert len(set(exponents.ravel())) == 1


def test_multipliers_beyond_a_byte_become_group_scales() -> None:
    weight = make_weight("fc", container="fp8")
    weight.scales[:] = weight.scales.min() * np.where(
        np.arange(weight.scales.shape[1]) == 1, np.float32(192), np.float32(1)
    )
    model = lowered(one_linear(weight, "e4m3"), "l4")
    assert "_g16s_" in op_types(model)[1]
    assert snr_db(reference(tokens(), weight, "e4m3")[1], run(model, tokens())[0]) > 110


def test_weights_alone_multiply_in_the_compute_type() -> None:
    weight = make_weight("fc", "e2m1", 16, "group")
    for compute, kind in (("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)):
        model = lowered(one_linear(weight, "none"), "orin", compute)
        assert kinds(model) == ["Cast", "PackedLinear", "Cast"]
        assert f"_none_{compute}_" in op_types(model)[1]
        (cast,) = (node for node in model.graph.node if node.output[0] in model.graph.node[1].input)
        assert onnx.helper.get_attribute_value(cast.attribute[0]) == kind
    with pytest.raises(InputError, match=r"fc: target orin has no kernel for weights alone.*compute: fp16"):
        lowered(one_linear(weight, "none"), "orin")


def test_layers_without_a_kernel_are_lowered_as_without_plugins() -> None:
    weight = make_weight("fc", "e4m3", 0, "channel")
    model = lowered(one_linear(weight, "e4m3"), "l4")
    assert "PackedLinear" not in kinds(model)
    assert "QuantizeLinear" in kinds(model)
    assert snr_db(reference(tokens(), weight, "e4m3")[1], run(model, tokens())[0]) > 110


def test_a_quantizer_per_kind_of_number() -> None:
    waist = WaistGraph()
    formats = {"a": "e2m1", "b": "e3m2", "c": "e2m1", "d": "e4m3"}
    weights = [make_weight(name, fmt, 0, "channel") for name, fmt in formats.items()]
    outputs = [waist.linear("x", weight) for weight in weights]
    model = lowered(waist.model(*outputs), "l4")
    assert kinds(model).count("TokenQuantize") == 2
    assert kinds(model).count("PackedLinear") == 3
    table = read_layer_table(model)
    assert [entry.container for entry in table] == ["int8", "fp8", "int8", "fp8"]
    assert [entry.encoding for entry in table] == ["int8", "fp8", "int8", "fp8"]
    results = run(model, tokens(), *(entry.values for entry in table))
    expected, _ = quantize_online(tokens(), get_format("e2m3"))
    for weight, y, entry, numbers in zip(weights, results[:4], table, results[4:], strict=True):
        assert snr_db(reference(tokens(), weight, "e2m3")[1], y) > 110
        assert np.array_equal(entry.decode_values(numbers), expected)


def test_a_quantizer_that_something_else_reads_is_named() -> None:
    waist = WaistGraph()
    y = waist.linear("x", make_weight("blocks.0.fc"))
    values = waist.node("Neg", "blocks.0.fc/values", output="negated")
    with pytest.raises(InputError, match=r"blocks\.0\.fc: target orin cannot run"):
        lowered(waist.model(y, values))


def test_scales_that_lose_bits_are_refused() -> None:
    weight = make_weight("blocks.0.fc", group_size=0, kind="channel")
    weight = replace(weight, scales=weight.scales * np.float32(2.0**-126))
    with pytest.raises(InputError, match=r"blocks\.0\.fc.*too small"):
        lowered(one_linear(weight))
