"""The block quantizers in standard ONNX operators."""

from __future__ import annotations

import math

import numpy as np

from plugins.block_scales import BlockScaling
from plugins.body import Body
from plugins.float_quantize.function_body import append_rounding
from plugins.float_quantize.reference import TINY


def append_quantize_blocks(
    body: Body,
    x: str,
    tensor_scale: str | None,
    values: str,
    scales: str,
    scaling: BlockScaling,
    *,
    scales_on_grid: bool = False,
) -> None:
    """x [..., K] → values [..., K], scales [..., K/G]; `scales_on_grid` leaves the tensor's scale out of them."""
    grouped = append_grouped(body, x, scaling.group_size)
    amax = body.op("ReduceMax", body.op("Abs", grouped), body.ints(-1), keepdims=1)
    if tensor_scale is None:
        whole = on_grid = _append_power_of_two(body, amax, scaling)
    else:
        quotient = body.op("Div", body.op("Div", amax, body.float(scaling.values.max)), tensor_scale)
        on_grid = f"{body.prefix}scales_on_grid"
        append_rounding(body, quotient, on_grid, scaling.scales)
        whole = body.op("Mul", on_grid, tensor_scale)
    body.op("Squeeze", on_grid if scales_on_grid else whole, body.ints(-1), output=scales)
    # A group whose scale is 0 becomes zeros.
    empty = body.op("Equal", whole, body.float(0.0))
    divisor = body.op("Where", empty, body.float(math.inf), whole)
    rounded = f"{body.prefix}grouped_values"
    append_rounding(body, body.op("Div", grouped, divisor), rounded, scaling.values)
    append_ungrouped(body, rounded, output=values)


def append_grouped(body: Body, x: str, group_size: int) -> str:
    """[..., K] → [..., K/G, G], whatever the rank."""
    lead = body.op("Shape", x, start=0, end=-1)
    return body.op("Reshape", x, body.op("Concat", lead, body.ints(-1, group_size), axis=0))


def append_ungrouped(body: Body, x: str, output: str | None = None) -> str:
    """[..., K/G, G] → [..., K]."""
    lead = body.op("Shape", x, start=0, end=-2)
    return body.op("Reshape", x, body.op("Concat", lead, body.ints(-1), axis=0), output=output)


def append_per_block(body: Body, values: str, scales: str, group_size: int, output: str | None = None) -> str:
    """values [..., K] times scales [..., K/G]."""
    grouped = append_grouped(body, values, group_size)
    return append_ungrouped(body, body.op("Mul", grouped, body.op("Unsqueeze", scales, body.ints(-1))), output)


def _append_power_of_two(body: Body, amax: str, scaling: BlockScaling) -> str:
    """The smallest power of two that is at least max(amax, TINY) / max.

    The logarithm only guesses; comparing puts a guess that is one off right, exactly.
    """
    t = body.op("Div", body.op("Max", amax, body.float(TINY)), body.float(scaling.values.max))
    guess = body.op("Ceil", body.op("Mul", body.op("Log", t), body.float(1 / math.log(2))))
    power = body.op("Pow", body.float(2.0), guess)
    raised = body.op("Where", body.op("Less", power, t), body.op("Mul", power, body.float(2.0)), power)
    half = body.op("Mul", raised, body.constant(np.float32(0.5)))
    return body.op("Where", body.op("Less", half, t), raised, half)
