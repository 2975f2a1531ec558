"""Types and shapes of a model's tensors, found without serializing its weights."""

from __future__ import annotations

import math

import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from exporter.passes.surgery import CONTRIB_DOMAIN

# Larger initializers enter shape inference and the checker by type alone: both would serialize the whole model.
_LARGEST_INFERRED_ELEMENTS = 1024


def element_types(graph: gs.Graph) -> dict[str, int]:
    """The ONNX element type of every tensor that has a known one; what an unknown operator makes is left out."""
    light = graph.copy()
    for tensor in light.tensors().values():
        if isinstance(tensor, gs.Constant) and math.prod(tensor.shape) > _LARGEST_INFERRED_ELEMENTS:
            variable = tensor.to_variable(tensor.dtype, tensor.shape)
            # graphsurgeon's exporter asks for what its own conversion does not set.
            variable.type = "tensor_type"
            light.inputs.append(variable)
    model: onnx.ModelProto = gs.export_onnx(light)
    values = (*model.graph.input, *model.graph.output, *infer(model))
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {name: kind for name, kind in types.items() if kind != onnx.TensorProto.UNDEFINED}


def infer(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Types and shapes of the tensors between the nodes; those behind an operator that is wrong are left out."""
    inferred = onnx.shape_inference.infer_shapes(skeleton(model))
    return list(inferred.graph.value_info)


def skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large initializers as inputs, so that it stays small and under protobuf's 2 GB.

    Of what it says of tensors between nodes only the results of operators stay that inference does not know.
    """
    unknown = {name for node in model.graph.node if node.domain == CONTRIB_DOMAIN for name in node.output}
    stated = [value for value in model.graph.value_info if value.name in unknown]
    small = [tensor for tensor in model.graph.initializer if not is_large(tensor)]
    large = [
        helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for tensor in model.graph.initializer
        if is_large(tensor)
    ]
    graph = helper.make_graph(
        list(model.graph.node),
        model.graph.name,
        [*model.graph.input, *large],
        list(model.graph.output),
        small,
        value_info=stated,
    )
    return helper.make_model(
        graph,
        opset_imports=list(model.opset_import),
        functions=list(model.functions),
        ir_version=model.ir_version,
    )


def is_large(tensor: onnx.TensorProto) -> bool:
    """True for an initializer that a `skeleton` has as an input."""
    return bool(math.prod(tensor.dims) > _LARGEST_INFERRED_ELEMENTS)
