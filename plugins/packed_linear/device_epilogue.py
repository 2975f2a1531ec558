"""What follows the sums: scales, bias, GELU, residual and gate, and the store."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_group_factors(
    multipliers,
    weight_scales,
    channel_rows,
    tile,
    TILES: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """What a tile's sums are multiplied by: INT8 multipliers, FP32 scales, or nothing of use."""
    if PARTIAL == "multipliers":
        factors = tl.load(multipliers + channel_rows * (TILES // GROUP_TILES) + tile // GROUP_TILES)
    elif PARTIAL == "scales":
        factors = tl.load(weight_scales + channel_rows * (TILES // GROUP_TILES) + tile // GROUP_TILES)
    else:
        factors = channel_rows
    return factors


@triton.jit
def store(
    acc,
    first_token,
    channels,
    x_scales,
    weight_scales,
    bias,
    residual,
    gate,
    rows,
    rows_per_sample,
    y,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECE: tl.constexpr,
    N: tl.constexpr,
    GROUP_SCALES: tl.constexpr,
    GELU: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Turn sums [channels, tokens] into y [tokens, channels], in pieces that fit registers and shared memory."""
    if BLOCK_N * BLOCK_M > PIECE:
        first, second = acc.reshape(BLOCK_N, 2, BLOCK_M // 2).permute(0, 2, 1).split()
        store(
            first, first_token, channels, x_scales, weight_scales, bias, residual, gate, rows, rows_per_sample, y,
            BLOCK_M // 2, BLOCK_N, PIECE, N, GROUP_SCALES, GELU, FACTOR,
        )  # fmt: skip
        store(
            second, first_token + BLOCK_M // 2, channels, x_scales, weight_scales, bias, residual, gate, rows,
            rows_per_sample, y, BLOCK_M // 2, BLOCK_N, PIECE, N, GROUP_SCALES, GELU, FACTOR,
        )  # fmt: skip
    else:
        tokens = first_token + tl.arange(0, BLOCK_M)
        value = tl.trans(acc).to(tl.float32)
        token_rows = tl.minimum(tokens, rows - 1)
        channel_rows = tl.minimum(channels, N - 1)
        if x_scales is not None:
            value *= tl.load(x_scales + token_rows)[:, None]
        if not GROUP_SCALES:
            value *= (tl.load(weight_scales + channel_rows) * FACTOR)[None, :]
        elif FACTOR != 1.0:
            value *= FACTOR
        if bias is not None:
            value += tl.load(bias + channel_rows)[None, :]
        if GELU:
            # x/2·(1 + tanh(u)) = x·sigmoid(2u), u = √(2/π)·(x + 0.044715 x³).
            argument = value + 0.044715 * value * value * value
            value = tl.div_rn(value, 1.0 + tl.exp(-1.5957691216057308 * argument))
        offsets = tokens.to(tl.int64)[:, None] * N + channels[None, :]
        mask = (tokens < rows)[:, None]
        if N % BLOCK_N != 0:
            mask = mask & (channels < N)[None, :]
        if residual is not None:
            sample = token_rows // rows_per_sample
            value *= tl.load(gate + sample[:, None] * N + channel_rows[None, :]).to(tl.float32)
            value += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)
