"""Gelu in the operators that every parser takes."""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs
from onnx import TensorProto

from exporter.passes.surgery import Splicer, element_type
from exporter.targets import Target
from exporter.tensorrt_parsers import PARSERS
from plugins.body import Body

# The tanh approximation is tanh(√(2/π)·(x + 0.044715·x³)), as the operator's definition has it.
_CUBIC = 0.044715


def spell_out_gelu(graph: gs.Graph, target: Target) -> int:
    """Gelu(x) → x·½·(1 + erf(x/√2)), or with tanh if approximated, when a parser of the target does not take Gelu.

    In FP32, between two Casts where x is in another type.
    """
    if all("Gelu" in PARSERS[name].operators for name in target.parsers):
        return 0
    splicer = Splicer()
    nodes: list[gs.Node] = []
    changed = 0
    for node in list(graph.nodes):
        if node.op != "Gelu" or node.domain not in (None, "", "ai.onnx"):
            nodes.append(node)
            continue
        tensors = {"x": node.inputs[0], "y": node.outputs[0]}
        approximated = node.attrs.get("approximate", "none") == "tanh"
        node.inputs.clear()
        node.outputs.clear()
        nodes += splicer.nodes(_body(f"{node.name}.", approximated, element_type(tensors["x"])), tensors)
        changed += 1
    graph.nodes = nodes
    return changed


def _body(prefix: str, approximated: bool, onnx_type: int) -> Body:
    body = Body(prefix)
    casts = onnx_type not in (TensorProto.FLOAT, TensorProto.UNDEFINED)
    x = body.op("Cast", "x", to=TensorProto.FLOAT) if casts else "x"
    if approximated:
        cube = body.op("Mul", body.op("Mul", x, x), x)
        inner = body.op("Add", x, body.op("Mul", cube, body.float(_CUBIC)))
        curve = body.op("Tanh", body.op("Mul", inner, body.float(math.sqrt(2 / math.pi))))
    else:
        curve = body.op("Erf", body.op("Mul", x, body.float(math.sqrt(0.5))))
    half = body.op("Mul", x, body.float(0.5))
    y = body.op("Mul", half, body.op("Add", curve, body.float(1.0)), output=None if casts else "y")
    if casts:
        body.op("Cast", y, to=onnx_type, output="y")
    return body
