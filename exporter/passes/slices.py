"""Slices that give back what was concatenated."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from exporter.passes.surgery import array_of, bypass, producer
from exporter.targets import Target


def forward_slices_of_concats(graph: gs.Graph, target: Target) -> int:
    """Slice(Concat(a, b, …)) → a (or b, …), when it cuts out exactly one of them, whose sizes are known.

    Sinusoidal embeddings are computed as [sin, cos] and turned into [cos, sin] in this way.
    """
    changed = 0
    for node in list(graph.nodes):
        source = _cut_out(node) if node.op == "Slice" else None
        changed += source is not None and bypass(graph, node, source)
    return changed


def _cut_out(node: gs.Node) -> gs.Tensor | None:
    concat = producer(node.inputs[0])
    bounds = [array_of(tensor) for tensor in node.inputs[1:]]
    if concat is None or concat.op != "Concat" or len(bounds) < 3 or any(b is None or b.size != 1 for b in bounds):
        return None
    start, end, axis, step = ([int(bound.item()) for bound in bounds if bound is not None] + [1])[:4]
    shape = node.inputs[0].shape
    if shape is None or step != 1 or axis % len(shape) != concat.attrs["axis"] % len(shape):
        return None
    found = [None if tensor.shape is None else tensor.shape[axis] for tensor in concat.inputs]
    sizes = [size for size in found if isinstance(size, int)]
    if len(sizes) < len(found):
        return None
    total = sum(sizes)
    start, end = (min(bound + total if bound < 0 else bound, total) for bound in (start, end))
    offset = 0
    for tensor, size in zip(concat.inputs, sizes, strict=True):
        if (offset, offset + size) == (start, end):
            return tensor
        offset += size
    return None
