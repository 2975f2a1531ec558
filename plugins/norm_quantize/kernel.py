"""Layer normalization with modulation, and the token quantizer, on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.kernels.device_rounding import inside, load_row, quantize_row


@triton.jit
def mean_of(pieces, K: tl.constexpr):
    """The mean of a row of K."""
    total = tl.sum(pieces[0], axis=0)
    for index in tl.static_range(1, len(pieces)):
        total = total + tl.sum(pieces[index], axis=0)
    return tl.div_rn(total, K * 1.0)


@triton.jit
def normalize(pieces, row, rows, EPSILON: tl.constexpr, K: tl.constexpr):
    """(x - mean) / √(variance + EPSILON), the variance from the differences; what does not exist is 0."""
    mean = mean_of(pieces, K)
    centered = ()
    squares = ()
    for index in tl.static_range(len(pieces)):
        difference = tl.where(inside(row, rows, index, K), pieces[index] - mean, 0.0)
        centered = centered + (difference,)
        squares = squares + (difference * difference,)
    factor = tl.div_rn(1.0, tl.sqrt_rn(mean_of(squares, K) + EPSILON))
    normalized = ()
    for index in tl.static_range(len(pieces)):
        normalized = normalized + (centered[index] * factor,)
    return normalized


@triton.jit
def norm_quantize(
    x,
    scale,
    shift,
    rows,
    rows_per_sample,
    numbers,
    scales,
    SHARED: tl.constexpr,
    EPSILON: tl.constexpr,
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

    scale and shift are [rows / rows_per_sample, K], or [K] for all rows if SHARED. Two passes over registers and one
    over memory. Every program reads scale and shift, before it needs them and from the caches but for the first of a
    sample: beside their bytes, K·(bytes of a float + 1) + 4 bytes a row are the floor of its time.
    """
    row = tl.program_id(0)
    sample = row * 0 if SHARED else row // rows_per_sample
    pieces = load_row(x, row, rows, K)
    factors = load_row(scale, sample, rows, K)
    shifts = load_row(shift, sample, rows, K)
    normalized = normalize(pieces, row, rows, EPSILON, K)
    modulated = ()
    for index in tl.static_range(len(pieces)):
        modulated = modulated + (normalized[index] * factors[index] + shifts[index],)
    quantize_row(
        modulated,
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
