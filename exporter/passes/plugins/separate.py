"""One activation quantizer per kind of number that it must make."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from exporter.container_choice import has_kernel
from exporter.passes.choose import scheme_of
from exporter.passes.surgery import is_output, variant_of
from exporter.targets import Target
from plugins.op import Gemm, OnlineQuantize


def separate_containers(graph: gs.Graph, target: Target) -> int:
    """FloatQuantizeOnline, read by FloatGemm of several containers → one FloatQuantizeOnline for each of them.

    Also for layers that have a kernel of ours beside ones that have none. The first container's keeps the names of its
    tensors; the others' carry the container's. A quantizer that anything else reads, or that is an output, stays.
    """
    changed = 0
    nodes: list[gs.Node] = []
    for node in graph.nodes:
        nodes.append(node)
        kinds = _readers_by_kind(graph, node)
        others = sorted(kinds, key=lambda kind: (kind != "int8", kind))[1:]
        nodes += [_own_quantizer(node, kind, kinds[kind]) for kind in others]
        changed += bool(others)
    graph.nodes = nodes
    return changed


def _readers_by_kind(graph: gs.Graph, node: gs.Node) -> dict[str, list[gs.Node]]:
    """The FloatGemm nodes that read a quantizer, by the numbers that they want; empty for what may not be split."""
    if variant_of(node, OnlineQuantize) is None or any(is_output(graph, tensor) for tensor in node.outputs):
        return {}
    kinds: dict[str, list[gs.Node]] = {}
    for reader in node.outputs[0].outputs:
        gemm = variant_of(reader, Gemm)
        if gemm is None:
            return {}
        container = str(reader.attrs["container"])
        kind = container if has_kernel(scheme_of(reader, gemm), gemm.count) else f"{container}.native"
        kinds.setdefault(kind, []).append(reader)
    return kinds


def _own_quantizer(quantizer: gs.Node, kind: str, readers: list[gs.Node]) -> gs.Node:
    outputs = [gs.Variable(f"{tensor.name}.{kind}", tensor.dtype, tensor.shape) for tensor in quantizer.outputs]
    for reader in readers:
        reader.inputs[0], reader.inputs[1] = outputs
    name, attributes = f"{quantizer.name}.{kind}", dict(quantizer.attrs)
    return gs.Node(quantizer.op, name, attributes, list(quantizer.inputs), outputs, domain=quantizer.domain)
