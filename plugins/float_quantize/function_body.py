"""The quantizers in standard ONNX operators."""

from __future__ import annotations

from plugins.body import Body
from plugins.float_quantize.reference import TINY
from plugins.formats import Format

FLOAT32_MANTISSA_BITS = 23


def append_online(body: Body, x: str, values: str, scales: str, fmt: Format) -> None:
    """x [..., K] → values [..., K], scales [..., 1]."""
    amax = body.op("ReduceMax", body.op("Abs", x), body.ints(-1), keepdims=1)
    body.op("Div", body.op("Max", amax, body.float(TINY)), body.float(fmt.max), output=scales)
    append_given(body, x, scales, values, fmt)


def append_given(body: Body, x: str, scales: str, values: str, fmt: Format) -> None:
    """x [..., K], scales → values [..., K]."""
    append_rounding(body, body.op("Div", x, scales), values, fmt)


def append_rounding(body: Body, t: str, values: str, fmt: Format) -> None:
    """t → `fmt.round(t)` with +0 for zeros, bit for bit, for every t but NaN.

    Veltkamp's splitting, c - (c - t) with c = t·(2^(23-M) + 1), rounds t to M + 1 significant bits, ties to even.
    Below `min_normal` the same c as at `min_normal` rounds to multiples of the step instead, and on a uniform grid
    c = 1.5·2^23·step does so everywhere. Each operation must round on its own: contracted into one fused
    multiply-add the splitting breaks. `max` is a value of the format, so clipping first changes no rounding, and
    nothing after it can overflow.
    """
    clipped = body.op("Clip", t, body.float(-fmt.max), body.float(fmt.max))
    if fmt.is_uniform:
        c = body.float(1.5 * 2**FLOAT32_MANTISSA_BITS * fmt.step)
    else:
        min_normal = body.float(fmt.min_normal)
        below = body.op("Less", body.op("Abs", clipped), min_normal)
        raised = body.op("Where", below, min_normal, clipped)
        c = body.op("Mul", raised, body.float(2 ** (FLOAT32_MANTISSA_BITS - fmt.mantissa_bits) + 1))
    body.op("Sub", c, body.op("Sub", c, clipped), output=values)
