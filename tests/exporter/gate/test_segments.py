"""What goes wrong while a segment's constants are computed is told in one line."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from exporter.errors import FidelityError
from exporter.gate.segments import DividedGraph


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
