"""Small results that are known before the graph runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from exporter.passes.half import SMALLEST_BYTES
from exporter.passes.surgery import is_output
from exporter.targets import Target

# Their results are no function of their inputs.
_RANDOM = frozenset({"Bernoulli", "Dropout", "Multinomial", "RandomNormalLike", "RandomUniformLike"})


def fold_constants(graph: gs.Graph, target: Target) -> int:
    """Node(constants) → its result, when that is one tensor under 1 KiB and the node is a standard operator.

    Larger ones stay: what is computed from packed weights, and constants stored in half, must not grow back.
    """
    folded = 0
    for node in graph.nodes:
        constant = bool(node.inputs) and all(isinstance(tensor, gs.Constant) for tensor in node.inputs)
        held = any(isinstance(value, gs.Tensor) for value in node.attrs.values())
        plain = not held and not node.domain and node.op not in _RANDOM and not list(node.subgraphs())
        if not constant or not plain or len(node.outputs) != 1 or is_output(graph, node.outputs[0]):
            continue
        if any(tensor.values.nbytes >= SMALLEST_BYTES for tensor in node.inputs):
            continue
        result = _evaluate(node, graph.opset)
        if result.nbytes >= SMALLEST_BYTES:
            continue
        output = node.outputs[0]
        node.outputs.clear()
        output.to_constant(result)
        folded += 1
    return folded


def _evaluate(node: gs.Node, opset: int) -> npt.NDArray[Any]:
    names = [f"i{index}" for index in range(len(node.inputs))]
    copy = helper.make_node(node.op, names, ["y"], **node.attrs)
    tensors = [numpy_helper.from_array(tensor.values, name) for name, tensor in zip(names, node.inputs, strict=True)]
    graph = helper.make_graph([copy], "constant", [], [onnx.ValueInfoProto(name="y")], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    results: Any = ReferenceEvaluator(model).run(None, {})
    return np.asarray(results[0])
