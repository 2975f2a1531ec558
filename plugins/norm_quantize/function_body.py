"""Layer normalization with modulation in standard ONNX operators."""

from __future__ import annotations

from plugins.body import Body
from plugins.norm_quantize.reference import EPSILON


def append_modulated_norm(body: Body, x: str, scale: str, shift: str) -> str:
    """x, scale and shift float32 → the modulated norm, operation by operation as the reference."""
    centered = body.op("Sub", x, body.op("ReduceMean", x, body.ints(-1), keepdims=1))
    variance = body.op("ReduceMean", body.op("Mul", centered, centered), body.ints(-1), keepdims=1)
    deviation = body.op("Sqrt", body.op("Add", variance, body.float(EPSILON)))
    normalized = body.op("Mul", centered, body.op("Div", body.float(1.0), deviation))
    return body.op("Add", body.op("Mul", normalized, scale), shift, output="modulated")
