"""Attention's scale, mask and modulation: fewer nodes, the same numbers up to FP32 rounding."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from exporter.passes import drop_broadcast_expands, fold_attention_scale, fold_modulation_offsets, run_passes
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import WaistGraph, op_types, run, snr_db, tokens

CPU = TARGETS["cpu"]


def _scores(scale: np.ndarray | None = None, *, shared: bool = False, rows: int = 3) -> onnx.ModelProto:
    """(x·s) @ (k·s), k with `rows` columns."""
    waist = WaistGraph()
    factor = np.float32(0.42) if scale is None else scale
    query = waist.node("Mul", "x", waist.constant("s", factor), output="query")
    flat = waist.node("ReduceMean", "x", output="mean", keepdims=1)
    wide = waist.node("Expand", flat, waist.constant("sizes", np.array([1, 64, rows], np.int64)), output="wide")
    key = waist.node("Mul", waist.constant("t", np.float32(0.42)), wide, output="key")
    outputs = [waist.node("MatMul", query, key, output="y")]
    if shared:
        outputs.append(waist.node("Neg", query, output="z"))
    return waist.model(*outputs)


@pytest.mark.parametrize(("rows", "scaled"), [(3, "key"), (90, "query")])
def test_the_scale_is_applied_once_to_the_smaller_operand(rows: int, scaled: str) -> None:
    before = _scores(rows=rows)
    after, (result,) = run_passes(before, (fold_attention_scale,), CPU)
    assert result.changed == 1
    assert [node.output[0] for node in after.graph.node if node.op_type == "Mul"] == [scaled]
    assert snr_db(run(before, tokens())[0], run(after, tokens())[0]) > 130
    assert run_passes(after, (fold_attention_scale,), CPU)[1][0].changed == 0


@pytest.mark.parametrize(
    "model", [_scores(np.full(64, 0.42, np.float32)), _scores(shared=True)], ids=["per channel", "read elsewhere"]
)
def test_other_scales_stay(model: onnx.ModelProto) -> None:
    assert run_passes(model, (fold_attention_scale,), CPU)[1][0].changed == 0


def _masked(sizes: list[int], reader: str = "Add", x_shape: tuple[str | int, ...] = ("batch", 5)) -> onnx.ModelProto:
    waist = WaistGraph()
    mask = waist.node("ReduceMax", "x", waist.constant("axis", np.array([1], np.int64)), output="mask", keepdims=1)
    wide = waist.node("Expand", mask, waist.constant("sizes", np.array(sizes, np.int64)), output="wide")
    operands = [wide, wide] if reader == "MatMul" else ["x", wide]
    return waist.model(waist.node(reader, *operands, output="y"), x_shape=x_shape, rank=len(sizes))


def test_a_mask_is_left_to_broadcast() -> None:
    before = _masked([1, 5, 1])
    after, (result,) = run_passes(before, (drop_broadcast_expands,), CPU)
    assert result.changed == 1
    assert op_types(after) == ["ReduceMax", "Add"]
    assert np.array_equal(run(after, tokens())[0], run(before, tokens())[0])


@pytest.mark.parametrize(
    "model",
    [_masked([3, 1, 1, 1]), _masked([1, 64, 64], "MatMul"), _masked([1, 5, 1], x_shape=("batch", "tokens"))],
    ids=["adds an axis", "is no broadcast", "size unknown"],
)
def test_other_expands_stay(model: onnx.ModelProto) -> None:
    assert run_passes(model, (drop_broadcast_expands,), CPU)[1][0].changed == 0


def _modulation(*, twice: bool = True, other: bool = False, ends: bool = False, parts: int = 2) -> onnx.ModelProto:
    """[shift, scale] = table + x's parts; y = x·(1 + scale) + shift."""
    waist = WaistGraph(count=64)
    table = waist.constant("table", np.random.default_rng(0).standard_normal((1, 2 * parts, 64)).astype(np.float32))
    waist.node("Split", waist.node("Add", table, "x", output="sum"), output="shift,scale", axis=1, num_outputs=2)
    one = waist.constant("one", np.float32(1))
    outputs = [waist.node("Mul", "shift", waist.node("Add", "scale", one, output="plus"), output="y")]
    if twice:
        outputs.append(waist.node("Neg", waist.node("Add", one, "scale", output="again"), output="z"))
    if other:
        outputs.append(waist.node("Neg", "scale", output="w"))
    if ends:
        outputs.append("plus")
    return waist.model(*outputs, x_shape=("batch", 2 * parts))


def test_the_offset_moves_into_the_table() -> None:
    before = _modulation(parts=1)
    after, (result,) = run_passes(before, (fold_modulation_offsets,), CPU)
    assert result.changed == 2
    assert op_types(after) == ["Add", "Split", "Mul", "Neg"]
    x = tokens()[:, :2]
    for old, new in zip(run(before, x), run(after, x), strict=True):
        assert snr_db(old, new) > 130
    assert run_passes(after, (fold_modulation_offsets,), CPU)[1][0].changed == 0


@pytest.mark.parametrize(
    "model",
    [_modulation(parts=1, other=True), _modulation(parts=2), _modulation(parts=1, ends=True)],
    ids=["read elsewhere", "wider parts", "an output"],
)
def test_other_offsets_stay(model: onnx.ModelProto) -> None:
    assert run_passes(model, (fold_modulation_offsets,), CPU)[1][0].changed == 0


def _broadcast_modulation(*table_shape: int, axis: int = 1) -> onnx.ModelProto:
    """As above, of x [batch, 2, 2] and a table with axes of its own."""
    waist = WaistGraph(count=2)
    table = waist.constant("table", np.random.default_rng(0).standard_normal(table_shape).astype(np.float32))
    waist.node("Split", waist.node("Add", "x", table, output="sum"), output="shift,scale", axis=axis, num_outputs=2)
    plus = waist.node("Add", "scale", waist.constant("one", np.float32(1)), output="plus")
    return waist.model(waist.node("Mul", "shift", plus, output="y"), x_shape=("batch", 2))


@pytest.mark.parametrize(
    ("table_shape", "axis"), [((2, 2), 1), ((2, 2), -2), ((2, 2), 2), ((2,), 2), ((2,), -1), ((2, 1), 1)]
)
def test_a_table_of_fewer_axes_gets_the_offset_on_the_axis_that_is_split(
    table_shape: tuple[int, ...], axis: int
) -> None:
    before = _broadcast_modulation(*table_shape, axis=axis)
    after, (result,) = run_passes(before, (fold_modulation_offsets,), CPU)
    assert result.changed == 1
    x = np.random.default_rng(1).standard_normal((3, 2, 2)).astype(np.float32)
    assert snr_db(run(before, x)[0], run(after, x)[0]) > 130


@pytest.mark.parametrize(("table_shape", "axis"), [((), 1), ((), -1), ((2,), 1), ((2,), -2), ((1, 2), 1), ((2, 1), 2)])
def test_a_constant_that_does_not_have_the_parts_stays(table_shape: tuple[int, ...], axis: int) -> None:
    model = _broadcast_modulation(*table_shape, axis=axis)
    assert run_passes(model, (fold_modulation_offsets,), CPU)[1][0].changed == 0
