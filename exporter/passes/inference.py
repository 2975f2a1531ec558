"""Types and shapes of a model's tensors, found without serializing its weights."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs
from onnx import helper

# Larger initializers enter shape inference and the checker by type alone: both would serialize the whole model.
_LARGEST_INFERRED_ELEMENTS = 1024


def element_types(graph: gs.Graph) -> dict[str, int]:
    """The ONNX element type of every tensor that has a known one; what an unknown operator makes is left out."""
    model: onnx.ModelProto = gs.export_onnx(graph)
    values = (*model.graph.input, *model.graph.output, *infer(model))
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {name: kind for name, kind in types.items() if kind != onnx.TensorProto.UNDEFINED}


def infer(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Types and shapes of the tensors between the nodes; those behind an operator that is wrong are left out."""
    inferred = onnx.shape_inference.infer_shapes(skeleton(model))
    return list(inferred.graph.value_info)


def skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large initializers as inputs, so that it stays small and under protobuf's 2 GB."""
    small = [tensor for tensor in model.graph.initializer if _elements(tensor) <= _LARGEST_INFERRED_ELEMENTS]
    large = [
        helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for tensor in model.graph.initializer
        if _elements(tensor) > _LARGEST_INFERRED_ELEMENTS
    ]
    graph = helper.make_graph(
        list(model.graph.node), model.graph.name, [*model.graph.input, *large], list(model.graph.output), small
    )
    return helper.make_model(
        graph,
        opset_imports=list(model.opset_import),
        functions=list(model.functions),
        ir_version=model.ir_version,
    )


def _elements(tensor: onnx.TensorProto) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return count
