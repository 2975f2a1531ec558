"""The low-bit linear in standard ONNX operators."""

from __future__ import annotations

from onnx import TensorProto

from plugins.body import Body
from plugins.float_dequantize.function_body import append_decode, append_per_group
from plugins.formats import Format


def append_weight(
    body: Body, stored: str, factors: str | None, fmt: Format, *, count: int, group_size: int, packed: bool
) -> str:
    """decode(stored)·factors, transposed: f32 [K, N]. INT32 or FLOAT factors per group, or none."""
    weight = append_decode(body, stored, fmt, count, packed)
    if factors is not None:
        weight = append_per_group(body, weight, factors, count, group_size)
    return body.op("Transpose", weight, perm=[1, 0])


def append_multipliers(body: Body, multipliers: str) -> str:
    """INT32 multipliers as FLOAT."""
    return body.op("Cast", multipliers, to=TensorProto.FLOAT)


def append_product(
    body: Body, values: str, weight: str, *, x_scales: str | None, weight_scales: str | None, bias: str | None
) -> None:
    """y = (values @ weight)·x_scales·weight_scalesᵀ + bias, leaving out what is None, in this order."""
    factors = [x_scales]
    if weight_scales is not None:
        factors.append(body.op("Transpose", weight_scales, perm=[1, 0]))
    steps = [("Mul", factor) for factor in factors if factor is not None]
    if bias is not None:
        steps.append(("Add", bias))
    y = body.op("MatMul", values, weight, output=None if steps else "y")
    for position, (op_type, operand) in enumerate(steps, start=1):
        y = body.op(op_type, y, operand, output="y" if position == len(steps) else None)
