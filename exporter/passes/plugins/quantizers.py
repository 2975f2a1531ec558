"""What stands before an activation quantizer becomes part of its kernel, which has the whole token at hand."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from exporter.passes.plugins.patterns import (
    is_hidden,
    is_row_per_sample,
    is_tanh_gelu,
    made_by,
    norm_of,
    operands,
    same_shape,
    serves_all_samples,
)
from exporter.passes.surgery import Splicer, array_of, producer, variant_of
from exporter.targets import Target
from plugins.op import GeluQuantize, NormQuantize, TokenQuantize


def fuse_norm_quantize(graph: gs.Graph, target: Target) -> int:
    """TokenQuantize(LayerNormalization(x) · scale + shift) → NormQuantize(x, scale, shift).

    Also without the multiplication and addition, with the norm's own weight and bias. When the norm is over the last
    of three axes with epsilon 1e-6, nothing else reads what lies between, and scale and shift both are a row per
    sample of x, or both one row for all. Not a norm with weights that is modulated, too.
    """
    splicer = Splicer()
    fused = 0
    for node in graph.nodes:
        quantize = variant_of(node, TokenQuantize)
        inputs = None if quantize is None else _norm_inputs(graph, node, quantize.k, splicer)
        if quantize is None or inputs is None:
            continue
        formats = (quantize.format, quantize.container, quantize.float_type, quantize.k)
        _become(node, NormQuantize(*formats, shared=serves_all_samples(inputs[1])), inputs)
        fused += 1
    return fused


def fuse_gelu_quantize(graph: gs.Graph, target: Target) -> int:
    """TokenQuantize(Gelu(x)) → GeluQuantize(x), when the Gelu is tanh's and nothing else reads it."""
    fused = 0
    for node in graph.nodes:
        quantize = variant_of(node, TokenQuantize)
        if quantize is None or not is_hidden(graph, node.inputs[0], node, f"{node.attrs['layer']}.input"):
            continue
        gelu = producer(node.inputs[0])
        if gelu is None or not is_tanh_gelu(gelu):
            continue
        variant = GeluQuantize(quantize.format, quantize.container, quantize.float_type, quantize.k)
        _become(node, variant, [gelu.inputs[0]])
        fused += 1
    return fused


def _become(node: gs.Node, variant: NormQuantize | GeluQuantize, inputs: list[gs.Tensor]) -> None:
    node.op, node.attrs, node.inputs = variant.op_type, variant.attributes(layer=node.attrs["layer"]), inputs


def _norm_inputs(graph: gs.Graph, node: gs.Node, channels: int, splicer: Splicer) -> list[gs.Tensor] | None:
    """x, scale and shift of the norm that alone feeds the quantizer; None if none does."""
    if not is_hidden(graph, node.inputs[0], node, f"{node.attrs['layer']}.input"):
        return None
    last = producer(node.inputs[0])
    norm = norm_of(last)
    if norm is not None:
        weights = (_row(norm.scale, channels, 1.0), _row(norm.shift, channels, 0.0))
        return [norm.x, *(splicer.shared(weight) for weight in weights)]
    for product, shift in operands(last, "Add"):
        multiply = made_by(product, graph, last)
        for normalized, scale in operands(multiply, "Mul"):
            norm = norm_of(made_by(normalized, graph, multiply))
            rows = [is_row_per_sample(row, channels) for row in (scale, shift)]
            if norm is None or norm.scale is not None or norm.shift is not None or not all(rows):
                continue
            if serves_all_samples(scale) == serves_all_samples(shift) and same_shape(norm.x, node.inputs[0]):
                return [norm.x, scale, shift]
    return None


def _row(weight: gs.Constant | None, channels: int, otherwise: float) -> gs.Constant:
    """A norm's weight as [1, 1, channels]."""
    array = None if weight is None else array_of(weight)
    if weight is None or array is None:
        name = f"{'ones' if otherwise else 'zeros'}.{channels}"
        return gs.Constant(name, np.full((1, 1, channels), otherwise, np.float32))
    return gs.Constant(f"{weight.name}.row", np.asarray(array, np.float32).reshape(1, 1, channels))
