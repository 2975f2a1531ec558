"""Plugins as the nodes of their function bodies, for the gate, which looks at what a kernel keeps to itself."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx
import onnx_graphsurgeon as gs

from exporter.passes.plugins.kernel_nodes import KernelOperator, kernel_of
from exporter.passes.surgery import Splicer
from exporter.targets import Target
from plugins.body import Body
from plugins.op import GeluQuantize, NormQuantize, PackedLinear

_HIDDEN: Mapping[type[KernelOperator], tuple[str, str]] = MappingProxyType(
    {
        NormQuantize: ("modulated", "input"),
        GeluQuantize: ("activated", "input"),
        PackedLinear: ("linear", "output"),
    }
)
"""What a body calls the tensor that stood between two operators before they were fused, and how its name ended."""


def open_plugins(graph: gs.Graph, target: Target) -> int:
    """TokenQuantize, NormQuantize, GeluQuantize, PackedLinear → the nodes of their function bodies.

    What a quantizer rounds is called "<layer>.input" again, and a linear's result with its bias, in FP32,
    "<layer>.output"; a tensor of the graph that has the name, being the same number in another type, gives it up.
    ONNX Runtime makes the same nodes of the functions when it loads the lowered graph.
    """
    splicer = Splicer()
    nodes: list[gs.Node] = []
    opened = 0
    for node in list(graph.nodes):
        operator = kernel_of(node)
        if operator is None:
            nodes.append(node)
            continue
        nodes += _body_of(node, operator, graph.opset, splicer)
        opened += 1
    graph.nodes = nodes
    return opened


def _body_of(node: gs.Node, operator: KernelOperator, opset: int, splicer: Splicer) -> list[gs.Node]:
    function = operator.function(opset)
    body = Body()
    body.nodes = list(function.node)
    tensors = dict(zip([*function.input, *function.output], [*node.inputs, *node.outputs], strict=True))
    tensors |= _inner_tensors(function, node, operator)
    node.inputs.clear()
    node.outputs.clear()
    return splicer.nodes(body, tensors)


def _inner_tensors(function: onnx.FunctionProto, node: gs.Node, operator: KernelOperator) -> dict[str, gs.Tensor]:
    layer = node.attrs["layer"]
    inner = [name for proto in function.node for name in proto.output if name not in function.output]
    names = {name: f"{node.outputs[0].name}.{name}" for name in inner}
    if type(operator) in _HIDDEN:
        hidden, ending = _HIDDEN[type(operator)]
        names[hidden] = f"{layer}.{ending}"
        for outer in node.outputs:
            if outer.name == names[hidden]:
                outer.name = f"{outer.name}.{operator.float_type}"
    return {inside: gs.Variable(name) for inside, name in names.items()}
