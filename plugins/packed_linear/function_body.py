"""The packed linear in standard ONNX operators, in float32: sums are exact up to 2^24."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto

from plugins.body import Body
from plugins.formats import get_format
from plugins.packed_linear.layout import Layout
from plugins.packed_linear.reference import GELU_CUBIC, SQRT_8_OVER_PI

if TYPE_CHECKING:
    from plugins.packed_linear.descriptor import PackedLinear


def packed_linear(variant: PackedLinear, opset: int) -> onnx.FunctionProto:
    """The operator's body. Raises OpsetError."""
    body = Body()
    weight = _append_weight(body, variant)
    y = body.op("MatMul", _append_x(body, variant), body.op("Transpose", weight, perm=[1, 0]))
    if variant.is_quantized:
        y = body.op("Mul", y, "x_scales")
    if variant.group_factors != "scales":
        y = body.op("Mul", y, body.op("Transpose", "weight_scales", perm=[1, 0]))
    if variant.has_bias:
        y = body.op("Add", y, "bias")
    y = body.op("Identity", y, output="linear")
    if variant.has_gelu:
        y = _append_gelu(body, y)
    if variant.has_residual:
        gated = body.op("Mul", y, body.op("Cast", "gate", to=TensorProto.FLOAT))
        y = body.op("Add", gated, body.op("Cast", "residual", to=TensorProto.FLOAT))
    body.op("Cast", y, to=variant.output_types["y"], output="y")
    doc = f"Linear layer, packed {variant.weight_format} weights, products in {variant.element.value}."
    names = tuple(variant.attributes(layer=""))
    return body.function(variant.op_type, variant.input_names, variant.output_names, names, opset, doc)


def _append_x(body: Body, variant: PackedLinear) -> str:
    """The activations as float32."""
    name = variant.input_names[0]
    if variant.container != "fp16":
        return body.op("Cast", name, to=TensorProto.FLOAT)
    octets = body.op("Mod", body.op("Cast", name, to=TensorProto.INT64), body.ints(256))
    return body.op("Gather", body.constant(get_format("e4m3").values), octets, axis=0)


def _append_weight(body: Body, variant: PackedLinear) -> str:
    """f32 [N, K]: numerators or values, times their groups' factors."""
    numbers = (variant.encoding.numbers * variant.encoding.factor).astype(np.float32)
    weight = body.op("Gather", body.constant(numbers), _append_fields(body, variant.layout), axis=0)
    if not variant.group_factors:
        return weight
    factors = "weight_scales"
    if variant.group_factors == "multipliers":
        factors = body.op("Cast", "multipliers", to=TensorProto.FLOAT)
    grouped = body.op("Reshape", weight, body.ints(0, -1, variant.group_size))
    scaled = body.op("Mul", grouped, body.op("Unsqueeze", factors, body.ints(-1)))
    return body.op("Reshape", scaled, body.ints(0, variant.k))


def _append_fields(body: Body, layout: Layout) -> str:
    """`Layout.unpack` as far as the stored fields, int64 [N, K].

    By division and remainder, since TensorRT parses no shifts.
    """
    words = body.op("Mod", body.op("Cast", "words", to=TensorProto.INT64), body.ints(2**32))
    octets = body.op("Reshape", _digits(body, words, 256, 4, by_place=False), body.ints(0, -1))
    plane = octets
    if layout.high_plane:
        plane = body.op("Slice", octets, body.ints(0), body.ints(layout.high_plane), body.ints(1))
    tiles = body.op("Reshape", plane, body.ints(0, layout.tiles, layout.tile // 2))
    fields = _digits(body, tiles, 16, 2, by_place=True)
    if layout.high_plane:
        high = body.op("Slice", octets, body.ints(layout.high_plane), body.ints(4 * layout.words), body.ints(1))
        quarters = body.op("Reshape", high, body.ints(0, layout.tiles, layout.tile // 4))
        top = _digits(body, quarters, 4, 4, by_place=True)
        fields = body.op("Add", body.op("Mul", fields, body.ints(2)), body.op("Div", top, body.ints(2)))
        fields = body.op("Add", fields, body.op("Mul", body.op("Mod", top, body.ints(2)), body.ints(32)))
    chunks = body.op("Slice", fields, body.ints(0), body.ints(layout.chunk), body.ints(2))
    rows = body.op("Reshape", chunks, body.ints(0, layout.tiles * layout.chunk))
    return body.op("Slice", rows, body.ints(0), body.ints(layout.count), body.ints(1))


def _digits(body: Body, numbers: str, radix: int, count: int, *, by_place: bool) -> str:
    """The `count` lowest digits of non-negative numbers.

    By place: all lowest digits along the last axis, then all second ones; otherwise each number's digits on a new axis.
    """
    if not by_place:
        powers = body.ints(*(radix**place for place in range(count)))
        return body.op("Mod", body.op("Div", body.op("Unsqueeze", numbers, body.ints(-1)), powers), body.ints(radix))
    places = [
        body.op("Mod", body.op("Div", numbers, body.ints(radix**place)), body.ints(radix)) for place in range(count)
    ]
    return body.op("Concat", *places, axis=-1)


def _append_gelu(body: Body, x: str) -> str:
    """As `reference.gelu`."""
    square = body.op("Mul", body.op("Mul", body.float(GELU_CUBIC), x), x)
    argument = body.op("Add", x, body.op("Mul", square, x))
    exponential = body.op("Exp", body.op("Mul", argument, body.float(-SQRT_8_OVER_PI)))
    return body.op("Div", x, body.op("Add", exponential, body.float(1.0)))
