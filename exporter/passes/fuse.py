"""Dequantize, multiply, add: one low-bit linear."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from exporter.passes.surgery import array_of, digest, give_name, online_quantizer, only_consumer, producer, variant_of
from exporter.targets import Target
from plugins.block_scales import BlockScaling
from plugins.domain import AUTO_CONTAINER
from plugins.op import DOMAIN, DequantizeValues, DequantizeWeight, Gemm, QuantizeBlocks


@dataclass(frozen=True)
class _Linear:
    """What was found around a weight: y = x·Wᵀ (+ bias)."""

    x: gs.Tensor
    y: gs.Tensor
    bias: gs.Constant | None
    first: gs.Node
    last: gs.Node


def fuse_linear(graph: gs.Graph, target: Target) -> int:
    """[FloatQuantizeOnline → FloatDequantize_values →] MatMul(·, Transpose(FloatDequantize_w)) [→ Add] → FloatGemm.

    Also with FloatQuantizeBlocks, when the weight has the same groups, and with Gemm (transB, or after a Transpose) for
    MatMul and Add. The quantizer stays, FloatGemm takes its values and scales. Not when the dequantized weight has
    another reader or is an output, or when the Gemm scales or transposes otherwise; when the product itself is needed
    elsewhere, the Add stays outside. Names the tensors by which a layer is found again: "<layer>.input", ".values",
    ".token_scales" (the first layer that reads them) and ".output".
    """
    fused = 0
    for node in list(graph.nodes):
        weight = variant_of(node, DequantizeWeight)
        if weight is None:
            continue
        linear = _find_linear(graph, node)
        if linear is None:
            continue
        _fuse(graph, node, weight, linear)
        fused += 1
    return fused


def _find_linear(graph: gs.Graph, dequantize: gs.Node) -> _Linear | None:
    codes = array_of(dequantize.inputs[0])
    reader = only_consumer(graph, dequantize.outputs[0])
    if reader is None or codes is None:
        return None
    weight, transposed = dequantize.outputs[0], False
    if reader.op == "Transpose" and reader.attrs.get("perm", [1, 0]) == [1, 0]:
        weight, transposed = reader.outputs[0], True
        reader = only_consumer(graph, weight)
    if reader is None or len(reader.inputs) < 2 or reader.inputs[1] is not weight:
        return None
    if reader.op == "MatMul" and transposed:
        return _with_add(graph, reader, len(codes))
    if reader.op == "Gemm":
        return _from_gemm(reader, transposed, len(codes))
    return None


def _with_add(graph: gs.Graph, matmul: gs.Node, features: int) -> _Linear:
    product = matmul.outputs[0]
    add = only_consumer(graph, product)
    if add is not None and add.op == "Add" and len(add.inputs) == 2:
        bias = _as_bias(next((t for t in add.inputs if t is not product), product), features)
        if bias is not None:
            return _Linear(matmul.inputs[0], add.outputs[0], bias, matmul, add)
    return _Linear(matmul.inputs[0], product, None, matmul, matmul)


def _from_gemm(gemm: gs.Node, transposed: bool, features: int) -> _Linear | None:
    plain = gemm.attrs.get("alpha", 1.0) == 1.0 and gemm.attrs.get("beta", 1.0) == 1.0
    if not plain or gemm.attrs.get("transA", 0) or bool(gemm.attrs.get("transB", 0)) == transposed:
        return None
    if len(gemm.inputs) < 3:
        return _Linear(gemm.inputs[0], gemm.outputs[0], None, gemm, gemm)
    bias = _as_bias(gemm.inputs[2], features)
    return None if bias is None else _Linear(gemm.inputs[0], gemm.outputs[0], bias, gemm, gemm)


def _as_bias(tensor: gs.Tensor, features: int) -> gs.Constant | None:
    """A constant that is one float per output feature, as [N]; None for everything else."""
    array = array_of(tensor)
    if array is None or array.dtype != np.float32 or array.size != features or array.shape[-1:] != (features,):
        return None
    return tensor if array.ndim == 1 else gs.Constant(f"bias.{digest(array)}", array.reshape(features))


def _fuse(graph: gs.Graph, dequantize: gs.Node, weight: DequantizeWeight, linear: _Linear) -> None:
    layer = dequantize.attrs["layer"]
    activation_format, operands, scaling = _activations(graph, linear.x, layer, weight)
    gemm = Gemm(
        weight_format=weight.format,
        activation_format=activation_format,
        group_size=weight.group_size,
        count=weight.count,
        has_multipliers=False,
        packed=weight.packed,
        has_bias=linear.bias is not None,
        scaling=scaling,
    )
    inputs = [*operands, *dequantize.inputs, *([] if linear.bias is None else [linear.bias])]
    index = next(i for i, node in enumerate(graph.nodes) if node is linear.last)
    linear.first.outputs.clear()
    linear.last.outputs.clear()
    asked = dequantize.attrs["container"]
    attributes = gemm.attributes(layer=layer, container="" if asked == AUTO_CONTAINER else asked)
    fused = gs.Node(gemm.op_type, layer, attributes, inputs, [linear.y], domain=DOMAIN)
    graph.nodes[index] = fused
    linear.last.inputs.clear()
    give_name(graph, linear.y, f"{layer}.output")


def _activations(
    graph: gs.Graph, x: gs.Tensor, layer: str, weight: DequantizeWeight
) -> tuple[str, list[gs.Tensor], BlockScaling | None]:
    """The activation format, the tensors that stand for x ((values, scales) of its quantizer, or x itself), and the
    block scaling of both operands.
    """
    quantize = _quantizer(x)
    variant = online_quantizer(quantize)
    scaling = variant.scaling if isinstance(variant, QuantizeBlocks) else None
    fits = scaling is None or (scaling.value_format, scaling.group_size) == (weight.format, weight.group_size)
    if quantize is None or variant is None or not fits:
        give_name(graph, x, f"{layer}.input")
        return "none", [x], None
    first = quantize.attrs["layer"]
    give_name(graph, quantize.inputs[0], f"{first}.input")
    give_name(graph, quantize.outputs[0], f"{first}.values")
    give_name(graph, quantize.outputs[1], f"{first}.token_scales")
    return variant.format, list(quantize.outputs), scaling


def _quantizer(x: gs.Tensor) -> gs.Node | None:
    """The node whose values and scales were multiplied to x."""
    dequantize = producer(x)
    if dequantize is None or variant_of(dequantize, DequantizeValues) is None:
        return None
    values, scales = dequantize.inputs
    quantize = producer(values)
    return quantize if quantize is not None and quantize is producer(scales) else None
