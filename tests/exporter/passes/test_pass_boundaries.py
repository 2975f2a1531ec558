"""Markers go, their names stay on the tensors."""

from __future__ import annotations

import numpy as np
import onnx

from exporter.passes import name_boundaries, run_passes
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import WaistGraph, op_types, run, tokens

CPU = TARGETS["cpu"]


def _named(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    named, (result,) = run_passes(model, (name_boundaries,), CPU)
    return named, result.changed


def test_tensors_between_blocks_take_the_first_name() -> None:
    waist = WaistGraph()
    first = waist.boundary(waist.node("Abs", "x", output="a"), "blocks.0.output", "m0")
    second = waist.boundary(first, "blocks.1.input", "m1")
    model, changed = _named(waist.model(waist.node("Neg", second, output="y")))
    assert changed == 2
    assert op_types(model) == ["Abs", "Neg"]
    y, inner = run(model, tokens(), "blocks.0.output")
    assert np.array_equal(inner, np.abs(tokens()))
    assert np.array_equal(y, -inner)


def test_conditioning_that_all_blocks_share_is_named_once() -> None:
    waist = WaistGraph()
    shared = waist.node("Abs", "x", output="a")
    one = waist.node("Neg", waist.boundary(shared, "blocks.timestep", "m0"), output="n")
    two = waist.node("Exp", waist.boundary(shared, "blocks.timestep", "m1"), output="e")
    model, _ = _named(waist.model(waist.node("Add", one, two, output="y")))
    assert op_types(model) == ["Abs", "Neg", "Exp", "Add"]
    assert model.graph.node[1].input == model.graph.node[2].input == ["blocks.timestep"]


def test_graph_input_keeps_its_name_and_gets_one_identity() -> None:
    waist = WaistGraph()
    one = waist.node("Neg", waist.boundary("x", "blocks.hidden", "m0"), output="n")
    two = waist.node("Exp", waist.boundary("x", "blocks.hidden", "m1"), output="e")
    model, _ = _named(waist.model(waist.node("Add", one, two, output="y")))
    assert op_types(model) == ["Identity", "Neg", "Exp", "Add"]
    assert [value.name for value in model.graph.input] == ["x"]
    assert np.array_equal(run(model, tokens(), "blocks.hidden")[1], tokens())


def test_graph_output_keeps_its_name() -> None:
    waist = WaistGraph()
    waist.boundary(waist.node("Abs", "x", output="a"), "blocks.0.output", "y")
    model, _ = _named(waist.model("y"))
    assert op_types(model) == ["Abs"]
    assert np.array_equal(run(model, tokens())[0], np.abs(tokens()))


def test_input_that_is_the_output_stays_valid() -> None:
    waist = WaistGraph()
    waist.boundary("x", "blocks.0.output", "y")
    model, _ = _named(waist.model("y"))
    assert np.array_equal(run(model, tokens())[0], tokens())


def test_second_tensor_with_the_same_name_is_left_unnamed() -> None:
    waist = WaistGraph()
    one = waist.boundary(waist.node("Abs", "x", output="a"), "blocks.mask", "m0")
    two = waist.boundary(waist.node("Neg", one, output="n"), "blocks.mask", "m1")
    model, _ = _named(waist.model(waist.node("Exp", two, output="y")))
    assert [name for node in model.graph.node for name in node.output].count("blocks.mask") == 1
    assert np.array_equal(run(model, tokens(), "blocks.mask")[1], np.abs(tokens()))


def test_graph_without_markers_does_not_change() -> None:
    waist = WaistGraph()
    model, changed = _named(waist.model(waist.node("Abs", "x", output="y")))
    assert changed == 0
    assert op_types(model) == ["Abs"]
