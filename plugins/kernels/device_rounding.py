"""What the quantizers' kernels share: a row held in registers, and its way from floats to container numbers.

Triton compiles these functions into a kernel; no other module imports this one. A row is a tuple of pieces, float32
[width] each, whose widths are powers of two (Triton has no others) and add up to little more than K.

Constants of a quantizer, by name: MAX, the format's largest value; FACTOR, the power of two by which values enter the
container; MANTISSA_BITS; STEP, the smallest step in container numbers; UNIFORM, whether it is the only one; CONTAINER,
"int8" or "fp8" (E4M3 bytes); WIDE, whether rows can be so large that their scales have no normal reciprocal.
FUSED and CONVERTS choose instructions that Triton's interpreter lacks, not results: fused multiply-adds, and the
hardware's conversion to E4M3.
"""

from __future__ import annotations

import triton
import triton.language as tl

MOST_PIECES = 3

# amax of a row of zeros, 2^-100, as bits: `plugins.float_quantize.reference.TINY`.
TINY_BITS = tl.constexpr(0x0D800000)
MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
# Adding it leaves a float32 whose low bits are the integer that |t| < 2^22 rounds to, ties to even.
INTEGER_GRID = tl.constexpr(1.5 * 2**23)
FLOAT32_MANTISSA_BITS = tl.constexpr(23)
# Beyond it the reciprocal of a scale, or what that leaves, is no normal number.
LARGEST_SCALE = tl.constexpr(2.0**96)
SHRINK = tl.constexpr(2.0**-64)
# E4M3's exponent bias is 7, float32's is 127.
E4M3_AT_THE_BOTTOM = tl.constexpr(2.0**-120)

# Four floats to four E4M3 bytes; a byte 0x80 (-0) becomes 0.
TO_E4M3 = tl.constexpr("""{
.reg .b16 low, high;
.reg .b32 bytes, nonzero;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 bytes, {low, high};
and.b32 nonzero, bytes, 0x7f7f7f7f;
add.u32 nonzero, nonzero, 0x7f7f7f7f;
or.b32 nonzero, nonzero, 0x7f7f7f7f;
and.b32 $0, bytes, nonzero;
}""")


@triton.constexpr_function
def piece_widths(k):
    """Powers of two that cover k, the largest first; the last may reach beyond k, by little unless it is the third."""
    widths = []
    left = k
    while left > 0:
        cover = 1 << (left - 1).bit_length()
        if len(widths) + 1 < MOST_PIECES and cover - left > left // 8:
            cover //= 2
        widths.append(cover)
        left -= cover
    return tuple(widths)


@triton.constexpr_function
def piece_starts(k):
    """The column at which each piece begins."""
    widths = piece_widths(k)
    return tuple(sum(widths[:index]) for index in range(len(widths)))


@triton.jit
def columns_of(index: tl.constexpr, K: tl.constexpr):
    """The columns of a piece."""
    return piece_starts(K)[index] + tl.arange(0, piece_widths(K)[index])


@triton.jit
def inside(row, rows, index: tl.constexpr, K: tl.constexpr):
    """bool [width]: which elements of a piece exist."""
    exists = tl.broadcast_to(row, (piece_widths(K)[index],)) < rows
    if piece_starts(K)[index] + piece_widths(K)[index] > K:
        exists = exists & (columns_of(index, K) < K)
    return exists


@triton.jit
def load_row(pointer, row, rows, K: tl.constexpr):
    """A row of a [rows, K] tensor, as float32 pieces; what does not exist is 0."""
    pieces = ()
    base = pointer + row.to(tl.int64) * K
    for index in tl.static_range(len(piece_widths(K))):
        piece = tl.load(base + columns_of(index, K), mask=inside(row, rows, index, K), other=0.0)
        pieces = pieces + (piece.to(tl.float32),)
    return pieces


@triton.jit
def scale_of(pieces, MAX: tl.constexpr):
    """max(amax, TINY) / MAX; NaN for a row that has one, since NaN's bits pass every number's."""
    top = tl.full((), TINY_BITS, tl.int32)
    for index in tl.static_range(len(pieces)):
        magnitude = pieces[index].to(tl.int32, bitcast=True) & MAGNITUDE_BITS
        top = tl.maximum(top, tl.max(magnitude, axis=0))
    return tl.div_rn(top.to(tl.float32, bitcast=True), MAX)


@triton.jit
def quotient(x, scale, FACTOR: tl.constexpr, FUSED: tl.constexpr):
    """x / scale · FACTOR, as near to the float32 division as every rounding to the formats' grids needs.

    FUSED multiplies by the reciprocal and by what the reciprocal leaves: two operations instead of the eight and more
    of a division, exact to 2^-46 before the last rounding. No quotient of two float32 is so near to where rounding it
    to float32 passes a midpoint of a grid (tests/plugins/kernels/test_quotient.py).
    """
    if FUSED:
        reciprocal = tl.div_rn(1.0, scale)
        rest = tl.div_rn(tl.fma(-reciprocal, scale, 1.0), scale)
        return tl.fma(x, reciprocal * FACTOR, x * (rest * FACTOR))
    return tl.div_rn(x, tl.broadcast_to(scale, x.shape)) * FACTOR


@triton.jit
def split(t, MANTISSA_BITS: tl.constexpr, STEP: tl.constexpr, UNIFORM: tl.constexpr):
    """t on the grid, as `plugins.float_quantize.function_body.append_splitting` describes; zeros are +0."""
    least = INTEGER_GRID * STEP
    if UNIFORM:
        return (t + least) - least
    c = tl.maximum(tl.abs(t) * (2.0 ** (FLOAT32_MANTISSA_BITS - MANTISSA_BITS) - 1), least)
    return c - (c - t)


@triton.jit
def to_e4m3(v, CONVERTS: tl.constexpr):
    """E4M3 bytes, int8, of numbers that either are E4M3's or, with CONVERTS, are rounded to it; zeros become 0."""
    if CONVERTS:
        return tl.inline_asm_elementwise(TO_E4M3, "=r,r,r,r,r", [v], dtype=tl.int8, is_pure=True, pack=4)
    bits = (v * E4M3_AT_THE_BOTTOM).to(tl.int32, bitcast=True)
    return (((bits >> 24) & 0x80) | ((bits >> 20) & 0x7F)).to(tl.int8)


@triton.jit
def to_number(
    t,
    MANTISSA_BITS: tl.constexpr,
    STEP: tl.constexpr,
    UNIFORM: tl.constexpr,
    CONTAINER: tl.constexpr,
    CONVERTS: tl.constexpr,
):
    """int8: the container number that t, in container numbers, is rounded to. |t| passes the largest by roundings only,
    since a row's scale is its own, so nothing has to saturate."""
    if CONTAINER == "int8":
        if not UNIFORM:
            t = split(t, MANTISSA_BITS, STEP, UNIFORM)
        return (t + INTEGER_GRID).to(tl.int32, bitcast=True).to(tl.int8)
    # The conversion rounds formats with E4M3's mantissa as they do.
    if UNIFORM or MANTISSA_BITS != 3 or not CONVERTS:
        t = split(t, MANTISSA_BITS, STEP, UNIFORM)
    return to_e4m3(t, CONVERTS)


@triton.jit
def quantize_row(
    pieces,
    row,
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
    """Store a row's scale, float32 [rows], and its container numbers, int8 [rows, K]."""
    scale = scale_of(pieces, MAX)
    tl.store(scales + row, scale, mask=row < rows)
    shrink = tl.where(scale > LARGEST_SCALE, SHRINK, 1.0)
    base = numbers + row.to(tl.int64) * K
    for index in tl.static_range(len(pieces)):
        t = pieces[index]
        if WIDE:
            t = quotient(t * shrink, scale * shrink, FACTOR, FUSED)
        else:
            t = quotient(t, scale, FACTOR, FUSED)
        number = to_number(t, MANTISSA_BITS, STEP, UNIFORM, CONTAINER, CONVERTS)
        tl.store(base + columns_of(index, K), number, mask=inside(row, rows, index, K))
