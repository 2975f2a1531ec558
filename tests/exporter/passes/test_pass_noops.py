"""Nodes that change nothing go; everything that might change something stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from exporter.passes import drop_noops, run_passes
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import WaistGraph, op_types, run, tokens

CPU = TARGETS["cpu"]


def _between(op_type: str, *constants: Any, rank: int = 3, **attributes: Any) -> onnx.ModelProto:
    """Abs → the node under test → Neg."""
    waist = WaistGraph()
    inputs = [waist.constant(f"c{index}", value) for index, value in enumerate(constants)]
    node = waist.node(op_type, waist.node("Abs", "x", output="a"), *inputs, output="b", **attributes)
    return waist.model(waist.node("Neg", node, output="y"), rank=rank)


def _int64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    "model",
    [
        _between("Identity"),
        _between("Reshape", _int64(-1, 5, 64), allowzero=1),
        _between("Reshape", _int64(0, 0, -1)),
        _between("Expand", _int64(1, 5, 1)),
        _between("Expand", _int64(64)),
        _between("Transpose", perm=[0, 1, 2]),
        _between("Cast", to=TensorProto.FLOAT),
        _between("Mul", np.float32(1)),
        _between("Div", np.float32([[1]])),
    ],
    ids=lambda model: f"{model.graph.node[1].op_type}",
)
def test_goes(model: onnx.ModelProto) -> None:
    after, (result,) = run_passes(model, (drop_noops,), CPU)
    assert result.changed == 1
    assert op_types(after) == ["Abs", "Neg"]
    assert np.array_equal(run(after, tokens())[0], -np.abs(tokens()))
    assert run_passes(after, (drop_noops,), CPU)[1][0].changed == 0


@pytest.mark.parametrize(
    "model",
    [
        _between("Reshape", _int64(-1, 64, 5)),
        _between("Reshape", _int64(-1, 64), rank=2),
        _between("Reshape", _int64(2, 5, 64)),
        _between("Expand", _int64(2, 1, 1, 1), rank=4),
        _between("Transpose", perm=[0, 2, 1]),
        _between("Transpose"),
        _between("Cast", to=TensorProto.DOUBLE),
        _between("Mul", np.float32(1.0000001)),
        _between("Mul", np.ones(64, np.float32)),
        _between("Mul", np.ones((1, 1, 1, 1), np.float32), rank=4),
        _between("Add", np.float32(0)),
    ],
    ids=lambda model: f"{model.graph.node[1].op_type}",
)
def test_stays(model: onnx.ModelProto) -> None:
    if model.graph.node[1].op_type == "Cast":
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    after, (result,) = run_passes(model, (drop_noops,), CPU)
    assert result.changed == 0
    assert op_types(after) == op_types(model)


def test_one_divided_by_x_stays() -> None:
    waist = WaistGraph()
    model = waist.model(waist.node("Div", waist.constant("one", np.float32(1)), "x", output="y"))
    assert run_passes(model, (drop_noops,), CPU)[1][0].changed == 0


def test_names_of_layers_and_blocks_and_a_path_from_input_to_output_stay() -> None:
    waist = WaistGraph()
    waist.node("Identity", "x", output="y")
    named = waist.node("Identity", waist.node("Abs", "x", output="a"), output="blocks.mask")
    model = waist.model("y", waist.node("Neg", named, output="z"))
    assert run_passes(model, (drop_noops,), CPU)[1][0].changed == 0


def test_at_the_end_of_the_graph_the_output_keeps_its_name() -> None:
    waist = WaistGraph()
    waist.node("Identity", waist.node("Abs", "x", output="a"), output="y")
    after, _ = run_passes(waist.model("y"), (drop_noops,), CPU)
    assert [value.name for value in after.graph.output] == ["y"]
    assert op_types(after) == ["Abs"]


def test_two_outputs_stay_two() -> None:
    waist = WaistGraph()
    waist.node("Identity", waist.node("Abs", "x", output="y"), output="z")
    after, (result,) = run_passes(waist.model("y", "z"), (drop_noops,), CPU)
    assert result.changed == 0
    assert [value.name for value in after.graph.output] == ["y", "z"]
