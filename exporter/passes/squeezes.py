"""Squeezes that squeeze nothing."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from exporter.passes.surgery import array_of, replace_uses
from exporter.targets import Target


def drop_noop_squeezes(graph: gs.Graph, target: Target) -> int:
    """Squeeze(x, axes) → x, when every one of the axes has a known size other than 1.

    In torch `x.squeeze(1)` of a wide dimension does nothing; the exporter writes it down as a Squeeze, which every
    runtime refuses. Axes of size 1, and mixtures, stay.
    """
    changed = 0
    for node in [node for node in graph.nodes if node.op == "Squeeze"]:
        if not _squeezes_nothing(node):
            continue
        source, output = node.inputs[0], node.outputs[0]
        node.outputs.clear()
        replace_uses(graph, output, source)
        changed += 1
    return changed


def _squeezes_nothing(node: gs.Node) -> bool:
    shape = node.inputs[0].shape
    axes = array_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if shape is None or axes is None or axes.size == 0:
        return False
    sizes = [shape[axis] for axis in axes.ravel() if -len(shape) <= axis < len(shape)]
    return len(sizes) == axes.size and all(isinstance(size, int) and size != 1 for size in sizes)
