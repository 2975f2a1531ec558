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
    if PARTIAL == "multipliers" or PARTIAL == "folded":
        factors = tl.load(multipliers + channel_rows * (TILES // GROUP_TILES) + tile // GROUP_TILES)
    elif PARTIAL == "scales":
        factors = tl.load(weight_scales + channel_rows * (TILES // GROUP_TILES) + tile // GROUP_TILES)
    else:
        factors = channel_rows
    return factors


@triton.jit
def scaled_sum(partial, factors, acc):
    """partial·factors + acc, rounded once: one instruction instead of two where they are floats."""
    if acc.dtype.is_floating():
        partial, factors = tl.broadcast(partial, factors)
        total = tl.fma(partial, factors, acc)
    else:
        total = acc + partial * factors
    return total


@triton.jit
def load_column_of_factors(
    multipliers,
    weight_scales,
    first_channel,
    tile,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    PARTIAL: tl.constexpr,
    IN_HALVES: tl.constexpr,
):
    """The factors of BLOCK_N channels, [BLOCK_N, 1].

    Triton loads in the layout of what the factors are used for only if they are fewer than the threads; otherwise they
    would pass through shared memory, and so would the decoded weights that depend on them. Halves are fewer.
    """
    if IN_HALVES:
        half: tl.constexpr = BLOCK_N // 2
        rows = first_channel + tl.arange(0, half)
        upper = load_group_factors(
            multipliers, weight_scales, tl.minimum(rows, N - 1), tile, TILES, GROUP_TILES, PARTIAL
        )  # fmt: skip
        lower = load_group_factors(
            multipliers, weight_scales, tl.minimum(rows + half, N - 1), tile, TILES, GROUP_TILES, PARTIAL
        )  # fmt: skip
        factors = tl.join(upper[:, None], lower[:, None]).permute(2, 0, 1).reshape(BLOCK_N, 1)
    else:
        rows = tl.minimum(first_channel + tl.arange(0, BLOCK_N), N - 1)
        factors = load_group_factors(multipliers, weight_scales, rows, tile, TILES, GROUP_TILES, PARTIAL)[:, None]
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
    # What belongs to channels is read once for all pieces.
    channel_rows = tl.minimum(channels, N - 1)
    scales = FACTOR if GROUP_SCALES else tl.load(weight_scales + channel_rows) * FACTOR
    offsets = None if bias is None else tl.load(bias + channel_rows)
    _store_pieces(
        acc, first_token, channels, x_scales, scales, offsets, residual, gate, rows, rows_per_sample, y, BLOCK_M,
        BLOCK_N, PIECE, N, GROUP_SCALES, GELU, FACTOR,
    )  # fmt: skip


@triton.jit
def _store_pieces(
    acc,
    first_token,
    channels,
    x_scales,
    channel_scales,
    channel_bias,
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
    if BLOCK_N * BLOCK_M > PIECE:
        first, second = acc.reshape(BLOCK_N, 2, BLOCK_M // 2).permute(0, 2, 1).split()
        _store_pieces(
            first, first_token, channels, x_scales, channel_scales, channel_bias, residual, gate, rows,
            rows_per_sample, y, BLOCK_M // 2, BLOCK_N, PIECE, N, GROUP_SCALES, GELU, FACTOR,
        )  # fmt: skip
        _store_pieces(
            second, first_token + BLOCK_M // 2, channels, x_scales, channel_scales, channel_bias, residual, gate,
            rows, rows_per_sample, y, BLOCK_M // 2, BLOCK_N, PIECE, N, GROUP_SCALES, GELU, FACTOR,
        )  # fmt: skip
    else:
        tokens = first_token + tl.arange(0, BLOCK_M)
        value = tl.trans(acc).to(tl.float32)
        token_rows = tl.minimum(tokens, rows - 1)
        if x_scales is not None:
            value *= tl.load(x_scales + token_rows)[:, None]
        if not GROUP_SCALES:
            value *= channel_scales[None, :]
        elif FACTOR != 1.0:
            value *= FACTOR
        if channel_bias is not None:
            value += channel_bias[None, :]
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
            channel_rows = tl.minimum(channels, N - 1)
            value *= tl.load(gate + sample[:, None] * N + channel_rows[None, :]).to(tl.float32)
            value += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)
