"""The quantizers in standard ONNX operators."""

from __future__ import annotations

from plugins.body import Body
from plugins.float_quantize.reference import TINY
from plugins.formats import Format

FLOAT32_MANTISSA_BITS = 23


def append_online(body: Body, x: str, values: str, scales: str, fmt: Format) -> None:
    """x [..., K] → values [..., K], scales [..., 1]."""
    amax = body.op("ReduceMax", body.op("Abs", x) if fmt.min else x, body.ints(-1), keepdims=1)
    body.op("Div", body.op("Max", amax, body.float(TINY)), body.float(fmt.max), output=scales)
    append_given(body, x, scales, values, fmt)


def append_given(body: Body, x: str, scales: str, values: str, fmt: Format) -> None:
    """x [..., K], scales → values [..., K]."""
    append_rounding(body, body.op("Div", x, scales), values, fmt)


def append_rounding(body: Body, t: str, values: str, fmt: Format) -> None:
    """t → `fmt.round(t)` with +0 for zeros, bit for bit, for every t but NaN.

    `min` and `max` are values of the format, so clipping first changes no rounding, and nothing after it can overflow.
    """
    clipped = body.op("Clip", t, body.float(fmt.min), body.float(fmt.max))
    append_splitting(body, clipped, values, fmt, fmt.step)


def append_splitting(body: Body, t: str, values: str, fmt: Format, step: float) -> None:
    """t → t rounded to the grid whose smallest step is `step`, ties to even, for |t| up to the grid's largest value.

    Splitting after Veltkamp, c - (c - t) with c = |t|·(2^(23-M) - 1): c - t lies in the binade of |t|·2^(23-M),
    whose floats are multiples of t's own step, and c is even wherever t is a tie. Below the normal numbers c stays
    1.5·2^23·step, whose binade has floats at multiples of the smallest step; on a uniform grid it does everywhere.
    Exact for every float32 (`tests/plugins/float_quantize` tries all significands). Each operation must round on its
    own: contracted into one fused multiply-add it breaks.
    """
    least = body.float(1.5 * 2**FLOAT32_MANTISSA_BITS * step)
    c = least
    if not fmt.is_uniform:
        raised = body.op("Mul", body.op("Abs", t), body.float(2 ** (FLOAT32_MANTISSA_BITS - fmt.mantissa_bits) - 1))
        c = body.op("Max", raised, least)
    body.op("Sub", c, body.op("Sub", c, t), output=values)
