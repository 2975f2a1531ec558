"""Lowered products, integer for integer: what the graphs multiply and sum, against 64-bit sums of numerators."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from exporter.container_choice import choose_container
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.passes.encodings import unit_of
from exporter.passes.fold import fold_rows
from exporter.passes.layer_table import LayerEntry, read_layer_table
from exporter.presets import LayerScheme
from exporter.targets import TARGETS, Storage, Target
from plugins.container_product import ContainerProduct
from plugins.containers import CONTAINERS, FP8, INT8, factor, fits, multipliers
from plugins.float_quantize.reference import quantize_online
from plugins.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS, Values, get_format
from tests.exporter.passes.waist_graphs import TOKENS, Weight, make_weight, one_linear, reference, run, snr_db

CPU, SM86, SM89 = TARGETS["cpu"], TARGETS["rtx-sm86"], TARGETS["rtx-sm89"]
FP4 = ("e2m1", "e1m2", "e3m0")
IN_INT8 = [name for name in WEIGHT_FORMATS if fits(get_format(name), INT8)]
INT8_ACTIVATIONS = [name for name in ACTIVATION_FORMATS if fits(get_format(name), INT8)]
# On CPUs without VNNI, too.
SMALL_INT8_ACTIVATIONS = [name for name in INT8_ACTIVATIONS if name != "int8"]
IN_FP8 = [name for name in WEIGHT_FORMATS if fits(get_format(name), FP8)]
FP8_ACTIVATIONS = [name for name in ACTIVATION_FORMATS if fits(get_format(name), FP8)]


def lower(model: onnx.ModelProto, target: Target) -> tuple[onnx.ModelProto, LayerEntry]:
    """Lowered in the container that the layer asks for, or else in the one that the target chooses."""
    waist, _ = run_passes(model, WAIST_PASSES, target)
    lowered, _ = run_passes(waist, lowering_passes(target), target)
    (entry,) = read_layer_table(lowered)
    return lowered, entry


def folded_numerators(weight: Weight, channel: Values) -> np.ndarray:
    """int64 [N, K]: numerators times multipliers."""
    size = weight.group_size or weight.count
    steps = np.rint(weight.scales / channel).astype(np.int64)
    return get_format(weight.format).numerators[weight.codes] * np.repeat(steps, size, axis=1)


def integer_sums(x: Values, weight: Weight, channel: Values, activation_format: str) -> np.ndarray:
    """int64 [..., N], computed from the references' grid values."""
    values, _ = quantize_online(x, get_format(activation_format))
    numerators = np.rint(values.astype(np.float64) / get_format(activation_format).step).astype(np.int64)
    return np.asarray(numerators @ folded_numerators(weight, channel).T)


def output_of(model: onnx.ModelProto, op_type: str) -> str:
    (node,) = [node for node in model.graph.node if node.op_type == op_type]
    return str(node.output[0])


def stored_weight(model: onnx.ModelProto, name: str) -> np.ndarray:
    """The constant [K, N] as float64."""
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    if tensor.data_type == TensorProto.FLOAT8E4M3FN:
        raw = np.frombuffer(tensor.raw_data, ml_dtypes.float8_e4m3fn).reshape(tensor.dims)
        return raw.astype(np.float64)
    return numpy_helper.to_array(tensor).astype(np.float64)


@st.composite
def layers(draw: st.DrawFn, weights: list[str], activations: list[str], container: str) -> tuple[Weight, Values, str]:
    """A layer with channel or foldable scales, tokens of very different sizes, and an activation format."""
    name, activation = draw(st.sampled_from(weights)), draw(st.sampled_from(activations))
    allowed = multipliers(get_format(name), CONTAINERS[container])
    group = draw(st.sampled_from([0, 2, 3, 16] if len(allowed) > 1 else [0]))
    count = draw(st.integers(2, 12)) * max(group, 1)
    seed = draw(st.integers(0, 2**32 - 1))
    weight = make_weight(
        "fc",
        name,
        group,
        "foldable" if group else "channel",
        features=draw(st.integers(1, 40)),
        count=count,
        bias=draw(st.booleans()),
        container=container,
        seed=seed,
    )
    rng = np.random.default_rng(seed)
    sizes = 2.0 ** rng.integers(-30, 30, (2, TOKENS, 1))
    return weight, (rng.standard_normal((2, TOKENS, count)) * sizes).astype(np.float32), activation


def channel_scales(weight: Weight, target: Target) -> Values:
    """The channel scales [N, 1] that the fold finds for the container asked for, or else for the target."""
    if weight.scales.shape[1] == 1:
        return weight.scales
    names = target.containers if weight.container == "auto" else (weight.container,)
    for container in (CONTAINERS[name] for name in names if name in CONTAINERS):
        factors = fold_rows(weight.scales, multipliers(get_format(weight.format), container))
        if factors is not None:
            return factors[0]
    raise AssertionError("make_weight's foldable scales fold")


def extreme_weight(name: str, count: int, group_size: int, multiplier: int) -> Weight:
    """Two rows: the largest value everywhere, and its negative; all groups but the first times `multiplier`."""
    fmt = get_format(name)
    codes = fmt.encode(np.repeat(np.float32([[fmt.max], [-fmt.max]]), count, axis=1))
    scales = np.full((2, count // group_size if group_size else 1), multiplier * 2.0**-10, np.float32)
    scales[:, 1:2] /= multiplier
    return Weight("fc", name, group_size, codes, scales, None)


def extreme_tokens(activation_format: str, count: int) -> Values:
    """Every activation the largest value, or its negative, or alternately both."""
    x = np.full((1, TOKENS, count), get_format(activation_format).max, np.float32)
    x[0, 1] *= -1
    x[0, 2, ::2] *= -1
    return x


def all_pairs(weight_format: str, activation_format: str) -> tuple[Weight, Values]:
    """A layer whose output [i, :, j] is activation code i times weight code j, on scales of 1."""
    fmt, activation = get_format(weight_format), get_format(activation_format)
    codes = np.zeros((fmt.valid.sum(), 4), np.uint8)
    codes[:, 0] = np.flatnonzero(fmt.valid)
    values = activation.values[activation.valid]
    x = np.zeros((len(values), TOKENS, 4), np.float32)
    x[:, :, 0], x[:, :, 1] = values[:, None], activation.max
    return Weight("fc", weight_format, 0, codes, np.ones((len(codes), 1), np.float32), None), x


@given(layers(IN_INT8, SMALL_INT8_ACTIVATIONS, "int8"))
@settings(deadline=None, max_examples=100)
def test_cpu_accumulators_are_the_integer_sums(case: tuple[Weight, Values, str]) -> None:
    check_cpu_accumulators(*case)


@pytest.mark.usefixtures("exact_int8_products")
@given(layers(IN_INT8, ["int8"], "int8"))
@settings(deadline=None, max_examples=50)
def test_cpu_accumulators_are_the_integer_sums_of_int8_activations(case: tuple[Weight, Values, str]) -> None:
    check_cpu_accumulators(*case)


def check_cpu_accumulators(weight: Weight, x: Values, activation: str) -> None:
    lowered, entry = lower(one_linear(weight, activation), CPU)
    assert entry.container == "int8"
    y, sums = run(lowered, x, output_of(lowered, "MatMulInteger"))
    channel = channel_scales(weight, CPU)
    expected = integer_sums(x, weight, channel, activation)
    assert sums.dtype == np.int32
    assert np.array_equal(sums, expected)
    _, x_scales = quantize_online(x, get_format(activation))
    units = get_format(weight.format).step * get_format(activation).step
    exact = expected * (channel[:, 0].astype(np.float64) * x_scales * units)
    exact = exact if weight.bias is None else exact + weight.bias
    assert np.allclose(y, exact, rtol=1e-6, atol=1e-6 * float(np.abs(exact).max()))


@given(layers(IN_INT8, INT8_ACTIVATIONS, "int8"))
@settings(deadline=None, max_examples=100)
def test_tensorrt_int8_operands_have_the_integer_sums(case: tuple[Weight, Values, str]) -> None:
    weight, x, activation = case
    lowered, entry = lower(one_linear(weight, activation), SM86)
    assert entry.container == entry.encoding == "int8"
    numbers = run(lowered, x, entry.values)[1].astype(np.int64)
    sums = numbers @ stored_weight(lowered, "fc.int8").astype(np.int64)
    assert np.array_equal(sums, integer_sums(x, weight, channel_scales(weight, SM86), activation))


@given(layers(IN_FP8, FP8_ACTIVATIONS, "fp8"))
@settings(deadline=None, max_examples=100)
def test_tensorrt_fp8_operands_have_the_integer_sums(case: tuple[Weight, Values, str]) -> None:
    weight, x, activation = case
    weight = replace(weight, container="fp8")
    lowered, entry = lower(one_linear(weight, activation), SM89)
    assert entry.encoding == "fp8"
    channel = channel_scales(weight, SM89)
    largest = int(np.rint(weight.scales / channel).max())
    into = factor(get_format(weight.format), FP8, largest)
    assert into is not None
    numbers = entry.decode_values(run(lowered, x, entry.values)[1]) / get_format(activation).step
    numerators = stored_weight(lowered, "fc.fp8") / (into * get_format(weight.format).step)
    assert np.array_equal(numerators, folded_numerators(weight, channel).T)
    sums = numbers.astype(np.int64) @ numerators.astype(np.int64)
    assert np.array_equal(sums, integer_sums(x, weight, channel, activation))


@pytest.mark.parametrize("weight_format", FP4)
@pytest.mark.parametrize(("target", "container"), [(CPU, "int8"), (SM86, "int8"), (SM89, "fp8")])
def test_every_pair_of_codes(weight_format: str, target: Target, container: str) -> None:
    """16 weight codes × 64 activation codes (E2M3), exactly: as operands, as sums and as what the graph returns."""
    weight, x = all_pairs(weight_format, "e2m3")
    lowered, entry = lower(one_linear(replace(weight, container=container), "e2m3"), target)
    assert entry.container == container
    y, raw = run(lowered, x, entry.values)
    values = get_format("e2m3").values.astype(np.float64)
    pairs = np.multiply.outer(values, get_format(weight_format).values.astype(np.float64))
    assert pairs.shape == (64, 16)
    assert np.array_equal(entry.decode_values(raw)[:, 0, 0], values)
    assert np.array_equal(y[:, 0], pairs)
    if target == CPU:
        sums = run(lowered, x, output_of(lowered, "MatMulInteger"))[1][:, 0]
        units = get_format(weight_format).step * get_format("e2m3").step
    else:
        operand = raw.view(ml_dtypes.float8_e4m3fn) if container == "fp8" else raw
        sums = operand[:, 0].astype(np.float64) @ stored_weight(lowered, f"fc.{container}")
        units = unit_of(get_format("e2m3"), container) * (get_format(weight_format).step if container == "int8" else 1)
    assert np.array_equal(sums * units, pairs)


@pytest.mark.parametrize("weight_format", FP4)
def test_every_pair_of_codes_of_w4a8(weight_format: str) -> None:
    weight, x = all_pairs(weight_format, "e4m3")
    lowered, entry = lower(one_linear(weight, "e4m3"), SM89)
    assert entry.container == "fp8"
    valid = get_format("e4m3").valid
    pairs = np.multiply.outer(get_format("e4m3").values[valid], get_format(weight_format).values)
    assert np.array_equal(run(lowered, x)[0][:, 0], pairs)


@pytest.mark.parametrize("count", [4608, 8192])
@pytest.mark.parametrize("storage", get_args(Storage))
def test_sums_of_nothing_but_extremes_are_exact(count: int, storage: Storage) -> None:
    weight, x = extreme_weight("e2m1", count, 128, 10), extreme_tokens("e2m3", count)
    lowered, entry = lower(one_linear(weight, "e2m3"), CPU.with_storage(storage))
    assert entry.container == "int8"
    sums = run(lowered, x, output_of(lowered, "MatMulInteger"))[1]
    expected = integer_sums(x, weight, channel_scales(weight, CPU), "e2m3")
    assert np.array_equal(sums, expected)
    # All groups but one are ten times that one's scale.
    assert int(sums.max()) == 12 * 60 * (10 * (count - 128) + 128)
    assert int(sums.min()) == -int(sums.max())


def test_the_longest_sum_that_int32_holds_and_one_more() -> None:
    fmt = get_format("e2m3")
    longest = (2**31 - 1) // fmt.max_numerator**2
    weight, x = extreme_weight("e2m3", longest, 0, 1), extreme_tokens("e2m3", longest)
    lowered, entry = lower(one_linear(weight, "e2m3"), CPU.with_storage("container"))
    assert entry.container == "int8"
    sums = run(lowered, x, output_of(lowered, "MatMulInteger"))[1]
    assert np.array_equal(sums[0, :2], np.int64([[1, -1], [-1, 1]]) * fmt.max_numerator**2 * longest)
    for target, beyond in ((CPU, "fp32"), (SM89, "fp8")):
        scheme = LayerScheme("e2m3", 0, "channel", "e2m3")
        assert choose_container("fc", scheme, longest, target) == "int8"
        assert choose_container("fc", scheme, longest + 1, target) == beyond


@pytest.mark.parametrize("kind", ["channel", "foldable"])
def test_fp32_sums_on_a_cpu_are_exact_where_stated(kind: str) -> None:
    multiplier = 1 if kind == "channel" else 10
    longest = 2**24 // (12 * 448 * multiplier) // 16 * 16
    size = 0 if kind == "channel" else 16
    for count, exact in ((longest, True), (longest + 16, False)):
        weight, x = extreme_weight("e2m1", count, size, multiplier), extreme_tokens("e3m2", count)
        lowered, entry = lower(one_linear(weight, "e3m2"), CPU)
        fmt, activation = get_format("e2m1"), get_format("e3m2")
        stated = ContainerProduct(fmt, activation, CONTAINERS["fp32"], count, (1, multiplier))
        assert (entry.container, stated.exact) == ("fp32", exact)
        sums = run(lowered, x, output_of(lowered, "MatMul"))[1].astype(np.float64)
        expected = integer_sums(x, weight, channel_scales(weight, CPU), "e3m2") * (fmt.step * activation.step)
        # Where sums are not exact, scales are in the weight already.
        assert np.array_equal(sums, expected) == exact


def test_fp32_sums_of_random_codes_are_exact_where_stated() -> None:
    weight = make_weight("fc", "e2m1", 16, "foldable", count=256)
    lowered, entry = lower(one_linear(weight, "e3m2"), CPU)
    x = np.random.default_rng(3).standard_normal((2, TOKENS, 256)).astype(np.float32)
    y, sums = run(lowered, x, output_of(lowered, "MatMul"))
    expected = integer_sums(x, weight, channel_scales(weight, CPU), "e3m2")
    assert entry.container == "fp32"
    assert np.array_equal(sums.astype(np.float64) / (0.5 * get_format("e3m2").step), expected)
    assert snr_db(reference(x, weight, "e3m2")[1], y) > 120
