"""One activation quantizer for all layers that read the same tensor."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from exporter.passes.surgery import replace_uses, variant_of
from exporter.targets import Target
from plugins.op import DequantizeValues, OnlineQuantize


def share_activation_quantizers(graph: gs.Graph, target: Target) -> int:
    """FloatQuantizeOnline_f(x), …, FloatQuantizeOnline_f(x) → one of them, read by all; likewise their dequantizers.

    The first in the graph's order stays. Quantizers of other tensors, to other formats or along other axes stay too.
    """
    return _merge(graph, OnlineQuantize) + _merge(graph, DequantizeValues)


def _merge(graph: gs.Graph, kind: type[OnlineQuantize] | type[DequantizeValues]) -> int:
    kept: dict[tuple[object, ...], gs.Node] = {}
    merged = 0
    for node in graph.nodes:
        if variant_of(node, kind) is None:
            continue
        facts = sorted((key, value) for key, value in node.attrs.items() if key != "layer")
        first = kept.setdefault((node.op, *facts, *(id(tensor) for tensor in node.inputs)), node)
        if first is node:
            continue
        outputs = list(node.outputs)
        node.outputs.clear()
        for old, new in zip(outputs, first.outputs, strict=True):
            replace_uses(graph, old, new)
        merged += 1
    return merged
