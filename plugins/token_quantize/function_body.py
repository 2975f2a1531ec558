"""The token quantizer in standard ONNX operators."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto

from plugins.body import Body
from plugins.containers import FP8, FP16
from plugins.float_quantize.function_body import append_online
from plugins.formats import FORMATS
from plugins.token_quantize.reference import number_factor
from plugins.token_quantize.variant import QuantizerVariant

_E4M3 = FORMATS["e4m3"]


def append_float32(body: Body, name: str) -> str:
    """An input as float32, whatever its type."""
    return body.op("Cast", name, to=TensorProto.FLOAT)


def append_quantization(body: Body, x: str, variant: QuantizerVariant) -> None:
    """x float32 [..., K] → the outputs "numbers" and "scales"."""
    fmt, container = variant.number_format, variant.container
    append_online(body, x, "values", "scales", fmt)
    numbers = body.op("Mul", "values", body.float(number_factor(fmt, container)))
    if container == FP16.name:
        numbers = append_octets(body, numbers)
    body.op("Cast", numbers, output="numbers", to=FP8.onnx_type if container == FP8.name else TensorProto.INT8)


def append_octets(body: Body, numbers: str) -> str:
    """E4M3's numbers → their bytes, as integers -128 … 127 in float32.

    Within a binade codes are linear: 8·(exponent + 6) + number·2^(3 - exponent), where the exponent is at least -6.
    Half a step is added to the logarithm, so that its own rounding cannot fall below a power of two.
    """
    magnitude = body.op("Abs", numbers)
    logarithm = body.op("Div", body.op("Log", magnitude), body.float(math.log(2)))
    exponent = body.op("Floor", body.op("Add", logarithm, body.float(2.0 ** -(_E4M3.mantissa_bits + 2))))
    least = math.log2(_E4M3.min_normal)
    exponent = body.op("Max", exponent, body.float(least))
    scale = body.op("Gather", body.constant(_units()), _index(body, exponent, least))
    steps = body.op("Mul", magnitude, scale)
    binades = body.op("Mul", body.op("Sub", exponent, body.float(least)), body.float(2.0**_E4M3.mantissa_bits))
    code = body.op("Add", steps, binades)
    negative = body.op("Cast", body.op("Less", numbers, body.float(0.0)), to=TensorProto.FLOAT)
    return body.op("Sub", code, body.op("Mul", negative, body.float(2.0 ** (_E4M3.bits - 1))))


def _index(body: Body, exponent: str, least: float) -> str:
    return body.op("Cast", body.op("Sub", exponent, body.float(least)), to=TensorProto.INT64)


def _units() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """1 / (the step of each of E4M3's binades)."""
    binades = round(math.log2(_E4M3.max / _E4M3.min_normal)) + 1
    return (1 / (_E4M3.step * np.exp2(np.arange(binades)))).astype(np.float32)


def function_of(variant: QuantizerVariant, body: Body, opset: int, doc: str) -> onnx.FunctionProto:
    """The collected nodes as the variant's function."""
    names = tuple(variant.attributes(layer=""))
    return body.function(variant.op_type, variant.input_names, variant.output_names, names, opset, doc)
