"""Shape arithmetic, transposes and slices: folded when they are known, kept when they are not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from exporter.passes import fold_constants, fold_shapes, forward_slices_of_concats, merge_transposes, run_passes
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import WaistGraph, op_types, run, tokens

CPU = TARGETS["cpu"]


def _int64(waist: WaistGraph, *values: int) -> str:
    return waist.constant(f"i{'_'.join(map(str, values))}", np.array(values, np.int64))


def _key_transposed(x_shape: tuple[str | int, ...] = ("batch", 5)) -> onnx.ModelProto:
    """The last two axes swapped as torch exports it for attention's keys: by way of three axes."""
    waist = WaistGraph()
    heads = waist.node("Reshape", "x", _int64(waist, 0, 0, 4, 16), output="heads")
    key = waist.node("Transpose", heads, output="key", perm=[0, 2, 1, 3])
    shape = waist.node("Shape", key, output="shape")
    last = waist.node("Slice", shape, _int64(waist, -1), _int64(waist, 2**63 - 1), output="last")
    before = waist.node("Slice", shape, _int64(waist, -2), _int64(waist, -1), output="before")
    leading = waist.node("Slice", shape, _int64(waist, -(2**63)), _int64(waist, -2), output="leading")
    three = waist.node("Concat", _int64(waist, -1), before, last, output="three", axis=0)
    merged = waist.node("Reshape", key, three, output="merged")
    swapped = waist.node("Transpose", merged, output="swapped", perm=[0, 2, 1])
    four = waist.node("Concat", leading, last, before, output="four", axis=0)
    return waist.model(waist.node("Reshape", swapped, four, output="y"), x_shape=x_shape, rank=4)


def test_a_key_is_transposed_once() -> None:
    before = _key_transposed()
    after, results = run_passes(before, (fold_shapes, merge_transposes), CPU)
    assert [result.changed for result in results] == [2, 2]
    assert op_types(after) == ["Reshape", "Transpose"]
    for batch in (1, 3):
        assert np.array_equal(run(after, tokens(batch=batch))[0], run(before, tokens(batch=batch))[0])
    _, results = run_passes(after, (fold_shapes, merge_transposes), CPU)
    assert [result.changed for result in results] == [0, 0]


def test_two_unknown_sizes_are_not_folded() -> None:
    before = _key_transposed(("batch", "tokens"))
    after, results = run_passes(before, (fold_shapes, merge_transposes), CPU)
    assert results[1].changed == 0
    assert np.array_equal(run(after, tokens())[0], run(before, tokens())[0])


def test_shapes_by_gather_and_unsqueeze() -> None:
    waist = WaistGraph()
    shape = waist.node("Shape", "x", output="shape")
    batch = waist.node("Gather", shape, waist.constant("zero", np.int64(0)), output="batch")
    wide = waist.node("Unsqueeze", batch, _int64(waist, 0), output="wide")
    target = waist.node("Concat", wide, _int64(waist, 320), output="target", axis=0)
    after, (result,) = run_passes(
        waist.model(waist.node("Reshape", "x", target, output="y"), rank=2), (fold_shapes,), CPU
    )
    assert result.changed == 1
    assert op_types(after) == ["Reshape"]
    assert np.array_equal(run(after, tokens())[0], tokens().reshape(2, 320))


def test_a_shape_that_is_an_input_or_computed_otherwise_stays() -> None:
    waist = WaistGraph()
    doubled = waist.node("Mul", waist.node("Shape", "x", output="s"), _int64(waist, 1, 1, 1), output="d")
    model = waist.model(waist.node("Reshape", "x", doubled, output="y"))
    assert run_passes(model, (fold_shapes,), CPU)[1][0].changed == 0


def test_an_einsum_that_permutes_is_a_transpose() -> None:
    waist = WaistGraph()
    before = waist.model(waist.node("Einsum", "x", output="y", equation="abc -> cab"))
    after, (result,) = run_passes(before, (merge_transposes,), CPU)
    assert result.changed == 1
    assert op_types(after) == ["Transpose"]
    assert np.array_equal(run(after, tokens())[0], tokens().transpose(2, 0, 1))


@pytest.mark.parametrize(("equation", "rank"), [("abc->ab", 2), ("...c->c...", 3), ("abc,abc->abc", 3)])
def test_an_einsum_that_computes_stays(equation: str, rank: int) -> None:
    waist = WaistGraph()
    operands = ["x"] * (equation.count(",") + 1)
    model = waist.model(waist.node("Einsum", *operands, output="y", equation=equation), rank=rank)
    assert run_passes(model, (merge_transposes,), CPU)[1][0].changed == 0


def test_an_inner_transpose_that_others_read_stays() -> None:
    waist = WaistGraph()
    inner = waist.node("Transpose", "x", output="inner", perm=[0, 2, 1])
    outer = waist.node("Transpose", inner, output="outer", perm=[2, 0, 1])
    model = waist.model(waist.node("Neg", inner, output="a"), waist.node("Neg", outer, output="b"))
    assert run_passes(model, (merge_transposes,), CPU)[1][0].changed == 0


@pytest.mark.parametrize("sizes", [(-1, 80, 4), (-1, 64, 5)])
def test_a_reshape_that_moves_numbers_is_no_transpose(sizes: tuple[int, ...]) -> None:
    """[-1, 80, 4] regroups the sizes, and from [-1, 64, 5] of 5 x 64 the batch does not come back."""
    waist = WaistGraph()
    merged = waist.node("Reshape", "x", _int64(waist, *sizes), output="merged")
    swapped = waist.node("Transpose", merged, output="swapped", perm=[0, 2, 1])
    model = waist.model(waist.node("Reshape", swapped, _int64(waist, -1, 5, 64), output="y"))
    assert run_passes(model, (merge_transposes,), CPU)[1][0].changed == 0


def _swapped_halves(start: int, end: int) -> onnx.ModelProto:
    waist = WaistGraph()
    a, b = waist.node("Sin", "x", output="a"), waist.node("Cos", "x", output="b")
    both = waist.node("Concat", a, b, output="both", axis=-1)
    last = _int64(waist, 2)
    part = waist.node("Slice", both, _int64(waist, start), _int64(waist, end), last, output="part")
    return waist.model(waist.node("Neg", part, output="y"))


@pytest.mark.parametrize(("start", "end", "op"), [(0, 64, "Sin"), (64, 2**63 - 1, "Cos"), (-64, 128, "Cos")])
def test_a_slice_that_is_an_operand_is_forwarded(start: int, end: int, op: str) -> None:
    before = _swapped_halves(start, end)
    after, (result,) = run_passes(before, (forward_slices_of_concats,), CPU)
    assert result.changed == 1
    assert op_types(after) == [op, "Neg"]
    assert np.array_equal(run(after, tokens())[0], run(before, tokens())[0])


@pytest.mark.parametrize(("start", "end"), [(0, 63), (1, 65), (32, 96), (0, 128)])
def test_any_other_slice_stays(start: int, end: int) -> None:
    assert run_passes(_swapped_halves(start, end), (forward_slices_of_concats,), CPU)[1][0].changed == 0


def test_small_constants_are_folded_and_large_ones_are_not() -> None:
    waist = WaistGraph()
    small = waist.node("Neg", waist.constant("small", np.arange(64, dtype=np.float32)), output="negated")
    wide = waist.node("Expand", small, _int64(waist, 5, 64), output="wide")
    after, (result,) = run_passes(waist.model(waist.node("Add", "x", wide, output="y")), (fold_constants,), CPU)
    assert result.changed == 1
    assert op_types(after) == ["Expand", "Add"]
    assert np.array_equal(run(after, tokens())[0], tokens() - np.arange(64, dtype=np.float32))
    assert run_passes(after, (fold_constants,), CPU)[1][0].changed == 0


def test_random_numbers_are_not_folded() -> None:
    waist = WaistGraph()
    noise = waist.node("RandomNormalLike", waist.constant("c", np.zeros(64, np.float32)), output="noise")
    model = waist.model(waist.node("Add", "x", noise, output="y"))
    assert run_passes(model, (fold_constants,), CPU)[1][0].changed == 0


def test_a_constant_made_from_an_attribute_is_left_to_the_runtime() -> None:
    waist = WaistGraph()
    value = onnx.numpy_helper.from_array(np.array([2], np.float32))
    filled = waist.node("ConstantOfShape", _int64(waist, 64), output="filled", value=value)
    after, (result,) = run_passes(waist.model(waist.node("Mul", "x", filled, output="y")), (fold_constants,), CPU)
    assert result.changed == 0
    assert np.array_equal(run(after, tokens())[0], 2 * tokens())
