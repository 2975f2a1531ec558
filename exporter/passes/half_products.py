"""Matrix products with FP16 results, for builders that have none with FP32 results.

TensorRT-RTX 1.7 builds INT8 and FP16 products for Turing, but only with FP16 results. What is a sum of integers in
INT8 stays one; new is that the sum, times a power of two, is rounded to FP16 once. Scales that are powers of two keep
all the rest exact: a decoded weight or activation is an integer times one of them, which FP16 holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx import TensorProto

from exporter.compute import COMPUTE_TYPES
from exporter.errors import InputError
from exporter.passes.lowering import layer_of
from exporter.passes.surgery import array_of, producer
from exporter.targets import Target

_FP16 = COMPUTE_TYPES["fp16"]
# Decoded INT8 weights reach 128 times their scale.
_LARGEST_SCALE = 2.0**8
_LARGEST_CODE = 128


@dataclass(frozen=True)
class SplitScales:
    """Row scales [N] as `inside`, powers of two in FP16 that weights are decoded with, times `outside`, FP32 factors of
    the product."""

    inside: npt.NDArray[np.float16]
    outside: npt.NDArray[np.float32]

    @classmethod
    def of(cls, scales: npt.NDArray[np.float32], inside: npt.NDArray[np.float64]) -> SplitScales:
        """Divide `scales`, which a power of two leaves exact."""
        return cls(inside.astype(np.float16), (scales / inside).astype(np.float32))


def split_by_bound(name: str, weights: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]) -> SplitScales:
    """For INT8 activations: no activation whatever makes a product of row n of `weights` [K, N] overflow FP16.

    Its sum of integers is at most 128·Σ|w|. The smallest that is not 0 stays a normal number, so that FP16 rounds every
    sum by at most 2⁻¹¹ of itself. Raises `InputError` naming the layer where rows are too long for both.
    """
    bounds = np.abs(weights.astype(np.int64)).sum(axis=0) * _LARGEST_CODE
    inside = np.minimum(1.0, _power_of_two_below(_FP16.largest / np.maximum(bounds, 1)))
    if inside.min(initial=1.0) < _FP16.smallest_normal:
        raise InputError(
            f"{name}: sums of {len(weights)} products may reach {bounds.max()}, too many for a result in FP16; keep "
            "the layer in high precision with a rule `weight: none`"
        )
    return SplitScales.of(scales, inside)


def split_by_scale(scales: npt.NDArray[np.float32]) -> SplitScales:
    """For FP16 activations: the largest power of two in each scale, so that a product is no larger than its result.

    Scales so small or so large that decoded weights would leave FP16's normal numbers are split at the border.
    """
    powers = _power_of_two_below(scales.astype(np.float64))
    return SplitScales.of(scales, np.clip(powers, _FP16.smallest_normal, _LARGEST_SCALE))


def _power_of_two_below(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The largest power of two that is not above each of the positive `numbers`."""
    powers: npt.NDArray[np.float64] = np.ldexp(1.0, np.frexp(numbers)[1] - 1)
    return powers


def multiply_in_fp16(graph: gs.Graph, target: Target) -> int:
    """MatMul(x, DequantizeLinear(w, s)) → Mul(Cast(MatMul(x', DequantizeLinear(w, p))), s / p), when the target has no
    products with FP32 results, w is an INT8 constant and s its FP32 scales per row.

    p are powers of two in FP16. x' is x's INT8 tensor dequantized with scale 1 in FP16 where x is one dequantized with
    scale 1 (p by `split_by_bound`), else x in FP16 (p by `split_by_scale`, and `exporter.ranges` measures the product).
    """
    if target.fp32_products:
        return 0
    halves: dict[str, gs.Variable] = {}
    nodes: list[gs.Node] = []
    changed = 0
    for node in graph.nodes:
        decoder = _decoder_of_weight(node)
        if decoder is None:
            nodes.append(node)
            continue
        nodes += _in_fp16(node, decoder, halves)
        changed += 1
    graph.nodes = nodes
    return changed


def probe_products(graph: gs.Graph, target: Target) -> list[gs.Variable]:
    """y of a weight-only FloatGemm → "<layer>.product" = (y - bias) / outside, when the target has no FP32 products.

    These are the numbers that FP16 will hold after `multiply_in_fp16` and that no bound on the weights keeps small.
    """
    if target.fp32_products:
        return []
    probes = []
    for layer in [layer_of(node) for node in graph.nodes]:
        if layer is None or layer.gemm.quantizes_activations:
            continue
        product = gs.Variable(f"{layer.name}.product", np.float32)
        outside = split_by_scale(layer.weight_scales[:, 0] * np.float32(layer.format.step)).outside
        factors = gs.Constant(f"{product.name}.outside", outside)
        sums = layer.y
        if layer.bias is not None:
            sums = gs.Variable(f"{product.name}.sums", np.float32)
            graph.nodes.append(gs.Node("Sub", sums.name, {}, [layer.y, layer.bias], [sums]))
        graph.nodes.append(gs.Node("Div", product.name, {}, [sums, factors], [product]))
        probes.append(product)
    return probes


def _decoder_of_weight(node: gs.Node) -> gs.Node | None:
    """The DequantizeLinear of an INT8 constant, with one FP32 scale per row, that a MatMul reads as its weight."""
    decoder = producer(node.inputs[1]) if node.op == "MatMul" else None
    if decoder is None or decoder.op != "DequantizeLinear" or len(decoder.inputs) != 2:
        return None
    weight, scales = (array_of(tensor) for tensor in decoder.inputs)
    if weight is None or scales is None:
        return None
    return decoder if weight.dtype == np.int8 and scales.dtype == np.float32 and scales.ndim == 1 else None


def _in_fp16(matmul: gs.Node, decoder: gs.Node, halves: dict[str, gs.Variable]) -> list[gs.Node]:
    """The nodes in the place of `matmul`, which loses its tensors; `halves` are the activations in FP16 so far."""
    (x, _), (y,) = tuple(matmul.inputs), tuple(matmul.outputs)
    stored, row_scales = decoder.inputs
    integers = _integers(x)
    scales: npt.NDArray[Any] = row_scales.values
    layer = row_scales.name.removesuffix(".row_scales")
    split = split_by_scale(scales) if integers is None else split_by_bound(layer, stored.values, scales)
    nodes = []
    if x.name not in halves:
        halves[x.name] = gs.Variable(f"{x.name}.half", np.float16, x.shape)
        if integers is None:
            nodes.append(gs.Node("Cast", f"{x.name}.half", {"to": TensorProto.FLOAT16}, [x], [halves[x.name]]))
        else:
            one = gs.Constant(f"{x.name}.one", np.ones((), np.float16))
            inputs = [integers.inputs[0], one, integers.inputs[2]]
            nodes.append(gs.Node("DequantizeLinear", f"{x.name}.half", {}, inputs, [halves[x.name]]))
    inside = gs.Constant(f"{row_scales.name}.inside", split.inside)
    outside = gs.Constant(f"{row_scales.name}.outside", split.outside)
    weight, product, wide = (gs.Variable(f"{y.name}.{part}") for part in ("weight", "half", "wide"))
    matmul.inputs.clear()
    matmul.outputs.clear()
    return [
        *nodes,
        gs.Node("DequantizeLinear", weight.name, {"axis": 1}, [stored, inside], [weight]),
        gs.Node("MatMul", matmul.name, {}, [halves[x.name], weight], [product]),
        gs.Node("Cast", wide.name, {"to": TensorProto.FLOAT}, [product], [wide]),
        gs.Node("Mul", f"{y.name}.rescaled", {}, [wide, outside], [y]),
    ]


def _integers(x: gs.Tensor) -> gs.Node | None:
    """The DequantizeLinear, with scale 1, that makes `x` of INT8 numbers; None if something else makes it."""
    node = producer(x)
    if node is None or node.op != "DequantizeLinear" or len(node.inputs) != 3:
        return None
    scale, zero = (array_of(tensor) for tensor in node.inputs[1:])
    if scale is None or zero is None or zero.dtype != np.int8:
        return None
    return node if scale.size == 1 and float(scale) == 1 and not zero.any() else None
