"""Error feedback within some columns as one kernel, which Triton compiles; `error_feedback` launches it.

A column is rounded when all before it are, so a program takes a few rows and goes through their columns, which it holds
in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.kernels.device_rounding import INTEGER_GRID


@triton.jit
def round_columns(
    columns,
    scales,
    factor,
    values,
    errors,
    rows,
    count,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    STEP: tl.constexpr,
    MIN_NORMAL: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    UNIFORM: tl.constexpr,
    FIRST_EXPONENT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    exists = (row < rows)[:, None] & (column < count)[None, :]
    place = row.to(tl.int64)[:, None] * count + column[None, :]
    left = tl.load(columns + place, mask=exists, other=0.0)
    units = tl.load(scales + place, mask=exists, other=1.0)
    made = tl.zeros([ROWS, WIDTH], tl.float32)
    lost = tl.zeros([ROWS, WIDTH], tl.float64)
    for index in range(count):
        here = (column == index)[None, :]
        x = tl.sum(tl.where(here, left, 0.0), 1)
        unit = tl.sum(tl.where(here, units, 0.0), 1)
        value = _on_grid(
            (x / unit).to(tl.float32), LEAST, MOST, STEP, MIN_NORMAL, MANTISSA_BITS, UNIFORM, FIRST_EXPONENT
        )
        feedback = tl.load(factor + index * count + column, mask=(column >= index) & (column < count), other=0.0)
        diagonal = tl.sum(tl.where(column == index, feedback, 0.0), 0)
        error = (x - value.to(tl.float64) * unit) / diagonal
        made = tl.where(here, value[:, None], made)
        lost = tl.where(here, error[:, None], lost)
        left = left - error[:, None] * tl.where(column > index, feedback, 0.0)[None, :]
    tl.store(values + place, made, mask=exists)
    tl.store(errors + place, lost, mask=exists)


@triton.jit
def _on_grid(
    x,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    STEP: tl.constexpr,
    MIN_NORMAL: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    UNIFORM: tl.constexpr,
    FIRST_EXPONENT: tl.constexpr,
):
    """`exporter.rounding.round_to_format`, and every zero positive."""
    x = tl.minimum(tl.maximum(x, LEAST), MOST)
    bits = x.to(tl.int32, bitcast=True)
    if MANTISSA_BITS == 0:
        parity = ((bits >> 23) - FIRST_EXPONENT) & 1
        power = ((bits + (0x3FFFFF + parity)) & -0x800000).to(tl.float32, bitcast=True)
        below = (tl.div_rn(x, MIN_NORMAL) + INTEGER_GRID - INTEGER_GRID) * MIN_NORMAL
        rounded = tl.where(tl.abs(x) < MIN_NORMAL, below, power)
    elif UNIFORM:
        rounded = (tl.div_rn(x, STEP) + INTEGER_GRID - INTEGER_GRID) * STEP
    else:
        power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
        step = tl.maximum(power, MIN_NORMAL) * 2.0**-MANTISSA_BITS
        rounded = (tl.div_rn(x, step) + INTEGER_GRID - INTEGER_GRID) * step
    return rounded + 0.0
