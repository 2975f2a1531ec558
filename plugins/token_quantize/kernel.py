"""The token quantizer on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.kernels.device_rounding import load_row, quantize_row


@triton.jit
def token_quantize(
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
    """x [rows, K] → numbers int8 [rows, K], scales float32 [rows]; a row a program.

    Reads x once and writes numbers once: K·(bytes of a float + 1) + 4 bytes a row are the floor of its time.
    """
    row = tl.program_id(0)
    pieces = load_row(x, row, rows, K)
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
