"""Boundary markers become tensor names."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from exporter.passes.surgery import give_name, is_output, replace_uses, variant_of
from exporter.targets import Target
from plugins.op import Boundary


def name_boundaries(graph: gs.Graph, target: Target) -> int:
    """FloatBoundary[name](x) → x called `name`; or Identity(x) called `name`, when x is a graph input or a constant.

    A tensor takes the first name it is marked with, and a name goes to the first tensor marked with it: one block's
    output is the next one's input, and all blocks share their conditioning. A graph output keeps its own name.
    """
    named: dict[str, tuple[gs.Tensor, gs.Tensor]] = {}
    markers = [node for node in graph.nodes if variant_of(node, Boundary) is not None]
    for node in markers:
        source, output, name = node.inputs[0], node.outputs[0], node.attrs["name"]
        first_source, first_output = named.get(name, (None, None))
        if first_source is source:
            _remove(graph, node, first_output)
        elif source.inputs:
            if name not in named and not is_output(graph, output) and give_name(graph, source, name):
                named[name] = (source, source)
            _remove(graph, node, source)
        else:
            node.op, node.domain, node.attrs = "Identity", None, {}
            if name not in named and not is_output(graph, output):
                output.name = name
                named[name] = (source, output)
    return len(markers)


def _remove(graph: gs.Graph, node: gs.Node, replacement: gs.Tensor) -> None:
    output = node.outputs[0]
    node.outputs.clear()
    replace_uses(graph, output, replacement)
