"""Lowering for ONNX Runtime on a CPU: integer products of bytes, or float products of decoded weights."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from exporter.passes.cpu_quantizer import append_numerators, zero_point
from exporter.passes.cpu_weights import append_float_weight, append_integer_weight, append_unscaled_weight
from exporter.passes.lowering import Activation, FakeQuantizer, Layer, Quantizer, append_epilogue, lower
from exporter.passes.surgery import Splicer
from exporter.targets import Target
from plugins.block_quantize.function_body import append_per_block, append_quantize_blocks
from plugins.block_scales import BlockScaling
from plugins.body import Body
from plugins.float_quantize.function_body import append_online
from plugins.formats import get_format


def lower_to_cpu(graph: gs.Graph, target: Target) -> int:
    """FloatQuantizeOnline, FloatQuantizeBlocks, FloatGemm, FloatFakeQuantize → standard operators, by the layer's
    container.

    int8: x → uint8 numerators → MatMulInteger with int8 weights → ·weight scale ·token scale + bias, the sum exact.
    fp32: x → grid values → MatMul with float weights → ·token scale + bias; a weight-only layer multiplies x itself,
    and block scaling multiplies the values with their scales first. Where FP32 sums are exact, weights stay unscaled
    until after the sum.
    Weights of 4 bits stay 4 bits in the file and are expanded when the runtime loads it, unless the target's storage is
    the container: then those for int8 are the constants that their expansion would give. "<layer>.values" becomes the
    uint8 tensor, whose zero point is how many numerators the format has below 0.
    """
    in_bytes = target.storage == "container"
    return lower(graph, _quantize, partial(_multiply, in_bytes=in_bytes), FakeQuantizer.nodes)


def _quantize(quantizer: Quantizer, splicer: Splicer) -> tuple[list[gs.Node], Activation]:
    body = Body(f"{quantizer.layer}.quantize.{quantizer.container}.")
    tensors = {"x": quantizer.x, "values": quantizer.values, "scales": quantizer.scales}
    if quantizer.scaling is not None:
        return _quantize_blocks(quantizer, quantizer.scaling, splicer)
    if quantizer.container != "int8":
        append_online(body, "x", "values", "scales", quantizer.format)
        return splicer.nodes(body, tensors), Activation(quantizer.values, quantizer.scales)
    one = append_numerators(body, quantizer.x, quantizer.format)
    tensors[one] = gs.Variable(one)
    return splicer.nodes(body, tensors), Activation(quantizer.values, quantizer.scales, tensors[one])


def _quantize_blocks(quantizer: Quantizer, scaling: BlockScaling, splicer: Splicer) -> tuple[list[gs.Node], Activation]:
    """x → values and scales per block → their product, which is what is multiplied."""
    body = Body(f"{quantizer.layer}.quantize.{quantizer.container}.")
    tensors = {"x": quantizer.x, "values": quantizer.values, "scales": quantizer.scales}
    if quantizer.tensor_scale is not None:
        tensors["tensor_scale"] = quantizer.tensor_scale
    static = None if quantizer.tensor_scale is None else "tensor_scale"
    append_quantize_blocks(body, "x", static, "values", "scales", scaling)
    product = append_per_block(body, "values", "scales", scaling.group_size)
    tensors[product] = gs.Variable(product)
    return splicer.nodes(body, tensors), Activation(tensors[product], None)


def _multiply(layer: Layer, activation: Activation | None, splicer: Splicer, *, in_bytes: bool) -> list[gs.Node]:
    body = Body(f"{layer.name}.")
    tensors = {"x": layer.x, "y": layer.y}
    factors = []
    if activation is not None:
        tensors["x"] = activation.numbers
        if activation.scales is not None:
            tensors["token_scales"] = activation.scales
            factors = ["token_scales"]
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    if layer.container == "int8" and activation is not None and activation.one is not None:
        step = np.float32(layer.format.step)
        tensors["row_scales"] = gs.Constant(f"{layer.name}.row_scales", layer.weight_scales[:, 0] * step)
        tensors["one"] = activation.one
        weight = append_integer_weight(body, layer, tensors, splicer, in_bytes=in_bytes)
        sums = body.op("MatMulInteger", "x", weight, zero_point(body, get_format(layer.gemm.activation_format)))
        product = body.op("Cast", sums, to=TensorProto.FLOAT)
        factors = [body.op("Mul", "one", "row_scales"), *factors]
    elif layer.product is not None and layer.product.exact:
        tensors["row_scales"] = gs.Constant(f"{layer.name}.row_scales", layer.weight_scales[:, 0])
        product = body.op("MatMul", "x", append_unscaled_weight(body, layer, tensors, splicer))
        factors = ["row_scales", *factors]
    else:
        product = body.op("MatMul", "x", append_float_weight(body, layer, tensors, splicer))
    append_epilogue(body, product, factors, has_bias=layer.bias is not None)
    return splicer.nodes(body, tensors)
