"""Where a large graph is divided, and what its parts share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from exporter.errors import FidelityError
from exporter.gate.runs import Part, run_graph
from exporter.gate.segments import DividedGraph, segment_outputs, with_constants
from exporter.gate.subgraphs import given_name


def test_constants_that_cannot_be_computed_are_a_failure_of_the_gate() -> None:
    constants = {"six": np.zeros(6, np.float32), "shape": np.array([4, 2])}
    node = helper.make_node("Reshape", list(constants), ["eight"])
    graph = helper.make_graph(
        [node, helper.make_node("Add", ["x", "eight"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4, 2])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4, 2])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with pytest.raises(FidelityError, match="cannot compute the graph's constants") as failure:
        DividedGraph(model).part({}, ["y"])
    assert "\n" not in str(failure.value)


def value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4])


@pytest.fixture
def chain() -> onnx.ModelProto:
    """Two blocks called blocks.0 and blocks.1, as Hunyuan's are, which read a shared tensor and a doubled weight."""
    nodes = [helper.make_node("Neg", ["x"], ["blocks.temb"]), helper.make_node("Abs", ["x"], ["blocks.0.input"])]
    hidden = "blocks.0.input"
    for block in ("blocks.0", "blocks.1"):
        nodes += [
            helper.make_node("Add", [f"{block}.weight", f"{block}.weight"], [f"{block}.doubled"]),
            helper.make_node("Mul", [hidden, f"{block}.doubled"], [f"{block}.ff.net.2.output"]),
            helper.make_node("Add", [f"{block}.ff.net.2.output", "blocks.temb"], [f"{block}.output"]),
        ]
        hidden = f"{block}.output"
    nodes.append(helper.make_node("Neg", [hidden], ["sample"]))
    weights = [numpy_helper.from_array(np.full(4, size, np.float32), f"blocks.{size}.weight") for size in range(2)]
    graph = helper.make_graph(nodes, "chain", [value("x")], [value("sample")], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_tensors_inside_blocks_are_not_what_blocks_share(chain: onnx.ModelProto) -> None:
    assert segment_outputs(chain, ["blocks.0", "blocks.1"]) == [
        ("blocks.0.input", "blocks.temb"),
        ("blocks.0.output",),
        ("blocks.1.output",),
        ("sample",),
    ]


def test_every_segment_comes_with_its_own_constants(chain: onnx.ModelProto) -> None:
    graph = DividedGraph(chain)
    segments = segment_outputs(chain, ["blocks.0", "blocks.1"])
    constants = [constants for _, constants in with_constants(graph, segments)]
    assert [list(found) for found in constants] == [[], ["blocks.0.doubled"], ["blocks.1.doubled"], []]
    np.testing.assert_array_equal(constants[2]["blocks.1.doubled"], np.full(4, 2, np.float32))


def test_a_part_takes_known_constants_as_they_are(chain: onnx.ModelProto) -> None:
    known = {"blocks.1.doubled": np.full(4, 5, np.float32)}
    given = {name: np.ones((1, 4), np.float32) for name in ("blocks.0.output", "blocks.temb")}
    part = DividedGraph(chain).part(given, ["blocks.1.output"], known)
    feeds = [{given_name(name): array for name, array in given.items()}]
    ((output,),) = [list(found.values()) for found in run_graph(Path("chain.onnx"), feeds, optimized=True, part=part)]
    np.testing.assert_array_equal(output, np.full((1, 4), 6, np.float32))


def test_large_constants_reach_the_session_from_where_they_are() -> None:
    weight = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "part",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 64])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    part = Part(model, {"weight": weight})
    x = np.eye(1, 64, 3, dtype=np.float32)
    (found,) = run_graph(Path("part.onnx"), [{"x": x}], optimized=True, part=part)
    np.testing.assert_array_equal(found["y"], weight[3:4])
    (tensor,) = part.complete().graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), weight)
