"""The CPU lowering against the references: values bit for bit, integer products exactly, weights folded at load."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from exporter.container_choice import needs_vnni
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.passes.fold import fold_rows
from exporter.passes.layer_table import LayerEntry, read_layer_table
from exporter.targets import TARGETS, Storage
from exporter.this_cpu import product_of
from plugins.containers import INT8, multipliers
from plugins.float_quantize.reference import quantize_online
from plugins.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS, Values, get_format
from tests.exporter.passes.waist_graphs import (
    TOKENS,
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

CPU = TARGETS["cpu"]
IN_INT8 = [name for name in ACTIVATION_FORMATS if get_format(name).max_numerator <= 127]


def _lower(model: onnx.ModelProto, storage: Storage = "packed") -> tuple[onnx.ModelProto, tuple[LayerEntry, ...]]:
    waist, _ = run_passes(model, WAIST_PASSES, CPU)
    lowered, _ = run_passes(waist, lowering_passes(CPU), CPU.with_storage(storage))
    onnx.checker.check_model(lowered, full_check=True)
    return lowered, read_layer_table(lowered)


def hard_tokens(activation_format: str, count: int = 64) -> Values:
    """[2, TOKENS, count]: grid values, midpoints and their neighbours under scale 1, zeros, tiny and huge tokens."""
    fmt = get_format(activation_format)
    grid = np.unique(fmt.values[fmt.valid])
    middles = ((grid[1:] + grid[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(middles, np.float32(direction)) for direction in (-np.inf, np.inf)]
    pool = np.concatenate([grid, middles, *near])
    x = np.random.default_rng(1).choice(pool, (2, TOKENS, count)).astype(np.float32)
    x[:, :, 0] = fmt.max
    x[0, 0] = 0
    x[0, 1] *= np.float32(2**-110)
    x[0, 2] *= np.float32(2**100)
    x[0, 3] *= np.float32(1 / 3)
    return x


@pytest.mark.parametrize("activation_format", ACTIVATION_FORMATS)
def test_values_are_the_reference_s_bit_for_bit(activation_format: str) -> None:
    weight = make_weight("fc", group_size=0, kind="channel")
    lowered, (entry,) = _lower(one_linear(weight, activation_format))
    assert entry.encoding == ("uint8" if activation_format in IN_INT8 else "float32")
    for x in (hard_tokens(activation_format), tokens()):
        expected, _ = quantize_online(x, get_format(activation_format))
        assert np.array_equal(entry.decode_values(run(lowered, x, entry.values)[1]), expected)


@pytest.mark.parametrize("activation_format", IN_INT8)
@pytest.mark.parametrize(("weight_format", "kind"), [("e2m1", "foldable"), ("e1m2", "foldable"), ("e3m0", "channel")])
@pytest.mark.parametrize("bias", [True, False])
def test_integer_layers_are_exact(
    activation_format: str, weight_format: str, kind: str, bias: bool, request: pytest.FixtureRequest
) -> None:
    weight = make_weight("fc", weight_format, 0 if kind == "channel" else 16, kind, bias=bias)
    lowered, (entry,) = _lower(one_linear(weight, activation_format))
    if needs_vnni(product_of(entry)):
        request.getfixturevalue("exact_int8_products")
    x = tokens()
    y = run(lowered, x)[0]
    assert entry.container == "int8"
    assert np.array_equal(y, _integer_result(x, weight, activation_format))
    assert snr_db(reference(x, weight, activation_format)[1], y) > 120


def _integer_result(x: Values, weight: Weight, activation_format: str) -> Values:
    """Exact integer sums, then one float32 rounding for each scale and for the bias."""
    fmt, activation = get_format(weight.format), get_format(activation_format)
    values, x_scales = quantize_online(x, activation)
    channel = weight.scales if weight.group_size == 0 else _channel(weight)
    size = weight.group_size or weight.count
    factors = np.repeat(np.rint(weight.scales / channel), size, axis=1).astype(np.int64)
    sums = np.rint(values / activation.step).astype(np.int64) @ (fmt.numerators[weight.codes] * factors).T
    row = (channel[:, 0] * np.float32(fmt.step)).astype(np.float32)
    y: Values = (sums.astype(np.float32) * row) * (x_scales * np.float32(activation.step))
    return y if weight.bias is None else y + weight.bias


def _channel(weight: Weight) -> Values:
    """The channel scales, found again as the fold does: the row's smallest scale over its smallest multiplier."""
    factors = fold_rows(weight.scales, multipliers(get_format(weight.format), INT8))
    assert factors is not None
    return factors[0]


@pytest.mark.parametrize(
    ("weight_format", "kind", "activation_format"),
    [
        *[("e2m1", kind, name) for kind in ("channel", "foldable", "group") for name in ("e4m3", "none")],
        ("e4m3", "channel", "e3m4"),
        ("e4m3", "group", "e3m4"),
    ],
)
def test_float_layers_agree_with_the_reference(kind: str, weight_format: str, activation_format: str) -> None:
    weight = make_weight("fc", weight_format, 0 if kind == "channel" else 16, kind)
    lowered, (entry,) = _lower(one_linear(weight, activation_format))
    x = tokens()
    assert entry.container == "fp32"
    assert snr_db(reference(x, weight, activation_format)[1], run(lowered, x)[0]) > 120


def test_one_tensor_read_in_two_containers() -> None:
    waist = WaistGraph()
    weights = [make_weight("a"), make_weight("b", kind="group"), make_weight("c")]
    outputs = [waist.linear("x", weight) for weight in weights]
    lowered, entries = _lower(waist.model(*outputs))
    assert [entry.container for entry in entries] == ["int8", "fp32", "int8"]
    assert {entry.values for entry in entries} == {"a.values"}
    for y, weight in zip(run(lowered, tokens()), weights, strict=True):
        assert snr_db(reference(tokens(), weight, "e2m3")[1], y) > 120


@pytest.mark.parametrize("kind", ["channel", "foldable"])
@pytest.mark.parametrize("in_bytes", [False, True])
def test_runtime_folds_the_weight_to_bytes_and_fuses_the_product(tmp_path: Path, kind: str, in_bytes: bool) -> None:
    weight = make_weight("fc", group_size=0 if kind == "channel" else 16, kind=kind)
    lowered, _ = _lower(one_linear(weight), "container" if in_bytes else "packed")
    stored = {t.name: t.data_type for t in lowered.graph.initializer if np.prod(t.dims) >= 64}
    if in_bytes:
        assert stored == {"fc.int8": TensorProto.INT8}
    else:
        folded = {"fc.multipliers.u8": TensorProto.UINT8} if kind == "foldable" else {}
        tables = {name for name in stored if name.startswith("constant.")}
        assert stored == {"fc.u4": TensorProto.UINT4, **folded, **dict.fromkeys(tables, TensorProto.INT8)}
    large, kinds = _as_the_runtime_has_it(lowered, tmp_path)
    assert [(t.data_type, list(t.dims)) for t in large] == [(TensorProto.INT8, [64, 24])]
    assert kinds["MatMulIntegerToFloat"] == 1
    assert not {"Gather", "Mod", "Transpose", "Cast", "Slice"} & set(kinds)


def _as_the_runtime_has_it(model: onnx.ModelProto, folder: Path) -> tuple[list[onnx.TensorProto], Counter[str]]:
    """Large initializers and operators of the graph that ONNX Runtime makes of the model."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(folder / "optimized.onnx")
    return [t for t in optimized.graph.initializer if np.prod(t.dims) > 64], Counter(op_types(optimized))


@pytest.mark.parametrize(("weight_format", "kind"), [(n, "channel") for n in WEIGHT_FORMATS] + [("e2m3", "foldable")])
def test_both_ways_of_storing_a_weight_compute_the_same_bits(weight_format: str, kind: str) -> None:
    weight = make_weight("fc", weight_format, 0 if kind == "channel" else 16, kind)
    packed, in_bytes = (_lower(one_linear(weight), storage)[0] for storage in get_args(Storage))
    assert np.array_equal(run(packed, tokens())[0], run(in_bytes, tokens())[0])


def test_layers_that_share_a_weight_share_its_codes() -> None:
    waist = WaistGraph()
    weight = make_weight("a")
    model = waist.model(waist.linear("x", weight), waist.linear("x", replace(weight, layer="b")))
    for node in model.graph.node:
        node.input[:] = ["a.codes" if name == "b.codes" else name for name in node.input]
    lowered, _ = _lower(model)
    assert [t.name for t in lowered.graph.initializer if t.data_type == TensorProto.UINT4] == ["a.u4"]


@pytest.mark.parametrize("activation_format", [name for name in IN_INT8 if name != "int8"])
def test_pairs_of_products_fit_16_bits_without_vnni(activation_format: str) -> None:
    weight = make_weight("fc")
    lowered, (entry,) = _lower(one_linear(weight, activation_format))
    numbers = run(lowered, hard_tokens(activation_format), entry.values)[1]
    assert 2 * int(numbers.max()) * 120 <= np.iinfo(np.int16).max


def test_batch_stays_dynamic() -> None:
    weight = make_weight("fc")
    lowered, _ = _lower(one_linear(weight))
    for batch in (1, 3):
        x = tokens(batch=batch)
        assert run(lowered, x)[0].shape == (batch, TOKENS, 24)


def test_two_dimensional_input() -> None:
    waist = WaistGraph()
    flat = waist.node("Reshape", "x", waist.constant("flat", np.array([-1, 64], np.int64)), output="x2")
    weight = make_weight("fc")
    lowered, _ = _lower(waist.model(waist.linear(flat, weight), rank=2))
    x = tokens()
    assert snr_db(reference(x.reshape(-1, 64), weight, "e2m3")[1], run(lowered, x)[0]) > 120


def test_uniform_formats_are_divided_and_rounded_row_by_row_in_one_operator() -> None:
    for name in IN_INT8:
        lowered, _ = _lower(one_linear(make_weight("fc"), name))
        uniform = get_format(name).is_uniform
        quantizer = next(node for node in lowered.graph.node if node.op_type == "QuantizeLinear")
        assert any(attribute.name == "axis" and attribute.i == 0 for attribute in quantizer.attribute) == uniform
        assert op_types(lowered).count("Div") == (1 if uniform else 2)
        assert "Where" not in op_types(lowered)


@pytest.mark.parametrize("sizes", [("a", "b"), ("a", 7), (2, 7), (14,)])
def test_any_mix_of_known_and_unknown_sizes(sizes: tuple[int | str, ...]) -> None:
    # Channel scales: exact on every CPU.
    weight = make_weight("fc", group_size=0, kind="channel")
    waist = WaistGraph()
    lowered, (entry,) = _lower(waist.model(waist.linear("x", weight, "int8"), x_shape=sizes, rank=len(sizes) + 1))
    assert not needs_vnni(product_of(entry))
    shape = [size if isinstance(size, int) else 3 for size in sizes]
    x = np.random.default_rng(0).standard_normal([*shape, 64]).astype(np.float32)
    assert snr_db(reference(x, weight, "int8")[1], run(lowered, x)[0]) > 120
