"""One activation quantizer for all layers that read the same tensor."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from exporter.passes.surgery import array_of, digest, replace_uses, variant_of
from exporter.targets import Target
from plugins.op import DequantizeValues, OnlineQuantize, QuantizeBlocks


def share_activation_quantizers(graph: gs.Graph, target: Target) -> int:
    """FloatQuantizeOnline_f(x), …, FloatQuantizeOnline_f(x) → one of them, read by all; likewise their dequantizers.

    The first in the graph's order stays. Block quantizers (FloatQuantizeBlocks) are shared where their static scales
    are equal. Quantizers of other tensors, to other formats or along other axes stay too.
    """
    return sum(_merge(graph, kind) for kind in (OnlineQuantize, QuantizeBlocks, DequantizeValues))


def _merge(graph: gs.Graph, kind: type[OnlineQuantize] | type[QuantizeBlocks] | type[DequantizeValues]) -> int:
    kept: dict[tuple[object, ...], gs.Node] = {}
    merged = 0
    for node in graph.nodes:
        if variant_of(node, kind) is None:
            continue
        facts = sorted((key, value) for key, value in node.attrs.items() if key != "layer")
        first = kept.setdefault((node.op, *facts, *(_identity(tensor) for tensor in node.inputs)), node)
        if first is node:
            continue
        outputs = list(node.outputs)
        node.outputs.clear()
        for old, new in zip(outputs, first.outputs, strict=True):
            replace_uses(graph, old, new)
        merged += 1
    return merged


def _identity(tensor: gs.Tensor) -> object:
    """Constants are the same when their content is."""
    array = array_of(tensor)
    return id(tensor) if array is None else digest(array)
