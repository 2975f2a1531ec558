"""Squeezes of axes that are not of size 1 go, all others stay."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from exporter.passes import drop_noop_squeezes, run_passes
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import WaistGraph, op_types, run, tokens

CPU = TARGETS["cpu"]


def _squeeze(axes: list[int], x_shape: tuple[str | int, ...], rank: int = 3) -> onnx.ModelProto:
    waist = WaistGraph()
    wide = waist.node("Abs", "x", output="wide")
    narrow = waist.node("Squeeze", wide, waist.constant("axes", np.array(axes, np.int64)), output="narrow")
    return waist.model(waist.node("Neg", narrow, output="y"), x_shape=x_shape, rank=rank)


@pytest.mark.parametrize("axes", [[1], [-2], [1, 2]])
def test_squeeze_of_wide_axis_goes(axes: list[int]) -> None:
    model, (result,) = run_passes(_squeeze(axes, ("batch", 5)), (drop_noop_squeezes,), CPU)
    assert result.changed == 1
    assert op_types(model) == ["Abs", "Neg"]
    x = tokens()
    assert np.array_equal(run(model, x)[0], -np.abs(x))


def test_squeeze_that_ends_the_graph_goes_and_the_output_keeps_its_name() -> None:
    waist = WaistGraph()
    wide = waist.node("Abs", "x", output="wide")
    waist.node("Squeeze", wide, waist.constant("axes", np.array([1], np.int64)), output="y")
    model, _ = run_passes(waist.model("y"), (drop_noop_squeezes,), CPU)
    assert [value.name for value in model.graph.output] == ["y"]
    assert np.array_equal(run(model, tokens())[0], np.abs(tokens()))


@pytest.mark.parametrize(
    ("axes", "x_shape"),
    [([1], ("batch", 1)), ([1], ("batch", "tokens")), ([0], (1, 5)), ([0, 1], (1, 1))],
    ids=["size-1", "unknown", "leading-1", "two-of-size-1"],
)
def test_real_squeeze_stays(axes: list[int], x_shape: tuple[str | int, ...]) -> None:
    before = _squeeze(axes, x_shape, rank=3 - len(axes))
    model, (result,) = run_passes(before, (drop_noop_squeezes,), CPU)
    assert result.changed == 0
    assert op_types(model) == op_types(before)


def test_squeeze_without_axes_stays() -> None:
    waist = WaistGraph()
    waist.node("Squeeze", waist.node("Abs", "x", output="wide"), output="y")
    _, (result,) = run_passes(waist.model("y", x_shape=(1, 1), rank=1), (drop_noop_squeezes,), CPU)
    assert result.changed == 0
