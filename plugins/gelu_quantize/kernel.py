"""Tanh-GELU and the token quantizer on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.gelu_quantize import reference
from plugins.kernels.device_rounding import load_row, quantize_row

LINEAR = tl.constexpr(reference.LINEAR)
CUBIC = tl.constexpr(reference.CUBIC)


@triton.jit
def gelu(x):
    """Tanh-GELU in float32."""
    return x / (1.0 + tl.exp2(x * tl.fma(x * x, CUBIC, LINEAR)))


@triton.jit
def gelu_quantize(
    x,
    rows,
    numbers,
    scales,
    K: tl.constexpr,
    MAX: tl.constexpr,
    FACTOR: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    STEP: tl.constexpr,
    UNIFORM: tl.constexpr,
    CONTAINER: tl.constexpr,
    WIDE: tl.constexpr,
    FUSED: tl.constexpr,
    CONVERTS: tl.constexpr,
):
    """x [rows, K] → numbers int8 [rows, K] of GELU(x), scales float32 [rows]; a row a program.

    GELU is computed once and stays in registers. Bytes as `token_quantize`'s: K·(bytes of a float + 1) + 4 a row.
    """
    row = tl.program_id(0)
    inputs = load_row(x, row, rows, K)
    pieces = ()
    for index in tl.static_range(len(inputs)):
        pieces = pieces + (gelu(inputs[index]),)
    quantize_row(
        pieces,
        row,
        rows,
        numbers,
        scales,
        K,
        MAX,
        FACTOR,
        MANTISSA_BITS,
        STEP,
        UNIFORM,
        CONTAINER,
        WIDE,
        FUSED,
        CONVERTS,
    )
