"""Tanh-GELU in standard ONNX operators."""

from __future__ import annotations

from plugins.body import Body
from plugins.gelu_quantize.reference import CUBIC, LINEAR


def append_tanh_gelu(body: Body, x: str) -> str:
    """x float32 → GELU(x), operation by operation as the reference."""
    square = body.op("Mul", x, x)
    slope = body.op("Add", body.op("Mul", square, body.float(CUBIC)), body.float(LINEAR))
    power = body.op("Pow", body.float(2.0), body.op("Mul", x, slope))
    return body.op("Div", x, body.op("Add", power, body.float(1.0)), output="activated")
