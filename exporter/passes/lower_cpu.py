"""Lowering for ONNX Runtime on a CPU: integer products of bytes, or float products of decoded weights."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from exporter.passes.lowering import Activation, Layer, Quantizer, lower
from exporter.passes.surgery import Splicer
from exporter.targets import Target
from plugins.block_quantize.function_body import append_per_block, append_quantize_blocks
from plugins.block_scales import BlockScaling
from plugins.body import Body
from plugins.float_gemm.function_body import append_weight
from plugins.float_quantize.function_body import FLOAT32_MANTISSA_BITS, append_online
from plugins.float_quantize.reference import TINY
from plugins.formats import FloatFormat, Format, get_format
from plugins.packing import unpack_nodes


def lower_to_cpu(graph: gs.Graph, target: Target) -> int:
    """FloatQuantizeOnline, FloatQuantizeBlocks, FloatGemm → standard operators, by the layer's container.

    int8: x → uint8 numerators → MatMulInteger with int8 weights → ·weight scale ·token scale + bias, the sum exact.
    fp32: x → grid values → MatMul with float weights → ·token scale + bias; a weight-only layer multiplies x itself,
    and block scaling multiplies the values with their scales first.
    Weights are decoded from their words by nodes with constant inputs only, which the runtime folds when it loads
    the file. "<layer>.values" becomes the uint8 tensor, with the format's largest numerator as zero point.
    """
    return lower(graph, _quantize, _multiply)


def _quantize(quantizer: Quantizer, splicer: Splicer) -> tuple[list[gs.Node], Activation]:
    body = Body(f"{quantizer.layer}.quantize.{quantizer.container}.")
    tensors = {"x": quantizer.x, "values": quantizer.values, "scales": quantizer.scales}
    if quantizer.scaling is not None:
        return _quantize_blocks(quantizer, quantizer.scaling, splicer)
    if quantizer.container != "int8":
        append_online(body, "x", "values", "scales", quantizer.format)
        return splicer.nodes(body, tensors), Activation(quantizer.values, quantizer.scales)
    one = _append_numerators(body, quantizer.format)
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


def _append_numerators(body: Body, fmt: Format) -> str:
    """x → numerators + zero point, uint8, and scales per numerator; returns a scalar that is 1 at run time.

    scales is the reference's scale times the step, a power of two, so x / scales is bitwise the reference's quotient
    in units of the step. It never exceeds the largest numerator by more than rounding, so nothing is clipped.
    """
    amax = body.op("ReduceMax", body.op("Abs", "x"), body.ints(-1), keepdims=1)
    body.op("Div", body.op("Max", amax, body.float(TINY)), body.float(fmt.max_numerator), output="scales")
    t = body.op("Div", "x", "scales")
    if isinstance(fmt, FloatFormat) and not fmt.is_uniform:
        # Veltkamp's splitting keeps M + 1 bits; below the normal numbers QuantizeLinear itself rounds right.
        c = body.op("Mul", t, body.float(2.0 ** (FLOAT32_MANTISSA_BITS - fmt.mantissa_bits) + 1))
        kept = body.op("Sub", c, body.op("Sub", c, t))
        below = body.op("Less", body.op("Abs", t), body.float(fmt.min_normal / fmt.step))
        t = body.op("Where", below, t, kept)
    body.op("QuantizeLinear", t, body.float(1.0), _zero_point(body, fmt), output="values")
    # ONNX Runtime fuses MatMulInteger, Cast and Mul into one kernel only if the factor is a product whose scalar is
    # unknown until run time; without it, a layer of 1152 × 4608 takes a tenth longer.
    smallest = body.op("ReduceMin", "scales", keepdims=0)
    return body.op("Clip", smallest, body.float(1.0), body.float(1.0))


def _zero_point(body: Body, fmt: Format) -> str:
    """The largest numerator and not 128: CPUs without VNNI add pairs of products in 16 bits, where 2·120·120 fits."""
    return body.constant(np.uint8(fmt.max_numerator))


def _multiply(layer: Layer, activation: Activation | None, splicer: Splicer) -> list[gs.Node]:
    body = Body(f"{layer.name}.")
    tensors = {"x": layer.x, "y": layer.y, "stored": layer.stored}
    factors = []
    if activation is not None:
        tensors["x"] = activation.numbers
        if activation.scales is not None:
            tensors["token_scales"] = activation.scales
            factors = ["token_scales"]
    if layer.multipliers is not None:
        tensors["multipliers"] = gs.Constant(f"{layer.name}.multipliers.u8", layer.multipliers.astype(np.uint8))
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    if layer.container == "int8" and activation is not None and activation.one is not None:
        step = np.float32(layer.format.step)
        tensors["row_scales"] = gs.Constant(f"{layer.name}.row_scales", layer.weight_scales[:, 0] * step)
        tensors["one"] = activation.one
        activation_format = get_format(layer.gemm.activation_format)
        weight = _append_integer_weight(body, layer)
        sums = body.op("MatMulInteger", "x", weight, _zero_point(body, activation_format))
        product = body.op("Cast", sums, to=TensorProto.FLOAT)
        factors = [body.op("Mul", "one", "row_scales"), *factors]
    else:
        tensors["weight_scales"] = gs.Constant(f"{layer.name}.weight_scales", layer.weight_scales)
        product = body.op("MatMul", "x", _append_float_weight(body, layer))
    _append_epilogue(body, product, factors, has_bias=layer.bias is not None)
    return splicer.nodes(body, tensors)


def _append_epilogue(body: Body, product: str, factors: list[str], *, has_bias: bool) -> None:
    """product · factors + bias → y."""
    steps = [("Mul", factor) for factor in factors] + ([("Add", "bias")] if has_bias else [])
    for index, (op_type, operand) in enumerate(steps, start=1):
        product = body.op(op_type, product, operand, output="y" if index == len(steps) else None)
    if not steps:
        body.op("Identity", product, output="y")


def _append_integer_weight(body: Body, layer: Layer) -> str:
    """stored → numerators times multipliers, int8 [K, N]."""
    codes = _append_codes(body, layer)
    table = layer.format.numerators
    if layer.multipliers is None:
        weight = body.op("Gather", body.constant(table.astype(np.int8)), codes, axis=0)
        return body.op("Transpose", weight, perm=[1, 0])
    gathered = body.op("Gather", body.constant(table.astype(np.int32)), codes, axis=0)
    size, count = layer.gemm.group_size, layer.gemm.count
    grouped = body.op("Reshape", gathered, body.ints(0, count // size, size))
    multipliers = body.op("Unsqueeze", body.op("Cast", "multipliers", to=TensorProto.INT32), body.ints(-1))
    whole = body.op("Reshape", body.op("Mul", grouped, multipliers), body.ints(0, count))
    return body.op("Transpose", body.op("Cast", whole, to=TensorProto.INT8), perm=[1, 0])


def _append_codes(body: Body, layer: Layer) -> str:
    if not layer.gemm.packed:
        return body.op("Cast", "stored", to=TensorProto.INT64)
    codes = f"{layer.name}.codes"
    body.nodes += unpack_nodes("stored", codes, f"{layer.name}.unpack.", layer.format.bits, layer.gemm.count)
    return codes


def _append_float_weight(body: Body, layer: Layer) -> str:
    """stored → values times scales, f32 [K, N]; exact while the scales keep to 20 bits."""
    scales, gemm = "weight_scales", layer.gemm
    if layer.multipliers is not None:
        scales = body.op("Mul", scales, body.op("Cast", "multipliers", to=TensorProto.FLOAT))
    return append_weight(
        body, "stored", scales, layer.format, count=gemm.count, group_size=gemm.group_size, packed=gemm.packed
    )
