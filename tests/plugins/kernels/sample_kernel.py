"""Small kernels for the tests of the compiler, one of each kind that it must refuse."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_rows(x, factors, rows, y, K: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, K)[None, :]
    inside = row < rows
    factor = tl.load(factors + row, mask=inside, other=0.0)
    numbers = tl.load(x + row * K + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * K + column, (numbers * factor + factor).to(y.dtype.element_ty), mask=inside)


@triton.jit
def multiply(x, w, rows, y, SIZE: tl.constexpr, STAGES: tl.constexpr):
    """Square tiles in STAGES buffers of shared memory."""
    tile = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in tl.range(0, rows, num_stages=STAGES):
        total += tl.dot(tl.load(x + step * SIZE + tile), tl.load(w + step * SIZE + tile))
    tl.store(y + tile, total.to(tl.float16))


@triton.jit
def to_fp8(x, rows, y, K: tl.constexpr):
    column = tl.arange(0, K)
    numbers = tl.load(x + tl.program_id(0) * K + column).to(tl.float32)
    tl.store(y + tl.program_id(0) * K + column, numbers.to(tl.float8e4nv).to(tl.int8, bitcast=True))
