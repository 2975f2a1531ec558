"""What follows a packed linear becomes part of its kernel, which has the result in registers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from exporter.passes.plugins.patterns import (
    is_hidden,
    is_row_per_sample,
    is_tanh_gelu,
    made_by,
    operands,
    same_shape,
)
from exporter.passes.surgery import Splicer, producer, variant_of
from exporter.targets import Target
from plugins.domain import DOMAIN
from plugins.op import PackedLinear


@dataclass(frozen=True)
class _Linear:
    """A PackedLinear node whose kernel ends with the bias."""

    node: gs.Node
    variant: PackedLinear


def fuse_gelu_epilogue(graph: gs.Graph, target: Target) -> int:
    """Gelu(PackedLinear) → PackedLinear_gelu, when the Gelu is tanh's and nothing else reads the linear's result.

    After `fuse_gelu_quantize`, which takes what a quantizer alone reads.
    """
    fused = 0
    for index, node in enumerate(graph.nodes):
        linear = _plain_linear(graph, node.inputs[0], node) if is_tanh_gelu(node) else None
        if linear is None or linear.variant.has_gelu:
            continue
        variant = replace(linear.variant, has_gelu=True)
        graph.nodes[index] = _in_place_of(node, linear, variant, [])
        fused += 1
    return fused


def fuse_residual(graph: gs.Graph, target: Target) -> int:
    """residual + PackedLinear · gate → PackedLinear_residual(…, residual, gate); without a gate it is 1.

    When nothing else reads the linear's result and what it is multiplied to, the residual has the linear's own shape
    (neither broadcasts the other, nor does the gate its samples), and the gate is a row per sample or one row for all.
    """
    splicer = Splicer()
    fused = 0
    for index, node in enumerate(graph.nodes):
        for scaled, residual in operands(node, "Add"):
            found = _gated_linear(graph, scaled, node, splicer)
            if found is None or not same_shape(found[0].node.outputs[0], residual):
                continue
            linear, gate = found
            variant = replace(linear.variant, has_residual=True)
            graph.nodes[index] = _in_place_of(node, linear, variant, [residual, gate])
            fused += 1
            break
    return fused


def _plain_linear(graph: gs.Graph, result: gs.Tensor, reader: gs.Node | None) -> _Linear | None:
    """What makes `result` for `reader` alone, if it is a packed linear that nothing was fused to, but GELU."""
    node = producer(result)
    variant = None if node is None else variant_of(node, PackedLinear)
    if node is None or reader is None or variant is None or variant.has_residual:
        return None
    hidden = is_hidden(graph, result, reader, f"{node.attrs['layer']}.output")
    return _Linear(node, variant) if hidden else None


def _gated_linear(
    graph: gs.Graph, scaled: gs.Tensor, add: gs.Node, splicer: Splicer
) -> tuple[_Linear, gs.Tensor] | None:
    """The linear whose result, times a gate, is `scaled`, and the gate."""
    linear = _plain_linear(graph, scaled, add)
    if linear is not None:
        ones = np.ones((1, 1, linear.variant.n), np.float32)
        return linear, splicer.shared(gs.Constant(f"ones.{linear.variant.n}", ones))
    multiply = made_by(scaled, graph, add)
    for result, gate in operands(multiply, "Mul"):
        linear = _plain_linear(graph, result, multiply)
        if linear is not None and is_row_per_sample(gate, linear.variant.n):
            return linear, gate
    return None


def _in_place_of(last: gs.Node, linear: _Linear, variant: PackedLinear, more: list[gs.Tensor]) -> gs.Node:
    """The linear with what follows it up to the node `last`, whose result it makes."""
    inputs, outputs = [*linear.node.inputs, *more], list(last.outputs)
    for node in (linear.node, last):
        node.inputs.clear()
        node.outputs.clear()
    attributes = variant.attributes(layer=linear.node.attrs["layer"])
    return gs.Node(variant.op_type, linear.node.name, attributes, inputs, outputs, domain=DOMAIN)
