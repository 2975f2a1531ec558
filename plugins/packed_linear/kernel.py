"""The packed linear, in two forms: for many tokens and for few.

Many: roofline, per streaming multiprocessor and clock. Hopper multiplies 4096 pairs of 8-bit numbers, Ampere and Orin
2048, Ada and GeForce Blackwell 1024; all of them do 64 integer instructions. Decoding to INT8 takes 11 instructions for
8 weights (3 for evenly spaced formats), to FP8 8. A decoded weight meets BLOCK_M tokens, since Triton puts the warps of
two dots into one accumulator side by side along the weights. At 128 tokens a weight's decoding takes 11/8/64 = 0.021
clocks and its products 128/4096 = 0.031 on Hopper, 0.063 on Ampere. The two overlap between warps, but with addresses
and waits Hopper's integer units come close to their limit with INT8. Per K of 128 a tile of 128 × 128 reads 24 KB in
512 clocks of Hopper, 48 bytes a clock; 403 TOPS with tiles of 32 × 64 (measured) are 26 bytes a clock, near what its L2
delivers: hence large tiles, and bands of programs that share operands.

On Hopper Triton (3.6, 3.9) waits for every product that sums integers or is used within the loop. So a step is one
product, of both halves of its octets, and what overlaps with it is the work of other programs on the multiprocessor.
INT8 multipliers of groups are in the tables that weights are decoded by (`asm.py`): one sum, and half the registers.

The weights are the left operand: wgmma and tcgen05 take that one from registers and from tensor memory, so decoded
weights need no shared memory. Buffers stay within 48 KiB, all that an ahead-of-time plugin gets.

INT8 sums are exact in INT32, since the operator's name bounds K and multipliers. FP8 sums are FP32's but on Hopper,
whose tensor cores add FP8 products with about 14 bits (read, not measured): there PARTIAL is "promote", and each step's
sums (64 or 128 products) are added in FP32 registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.packed_linear.device_decode import decode, load_x, side_by_side
from plugins.packed_linear.device_epilogue import load_column_of_factors, load_group_factors, scaled_sum, store


@triton.jit
def packed_linear(
    x,
    x_scales,
    words,
    weight_scales,
    multipliers,
    bias,
    residual,
    gate,
    rows,
    rows_per_sample,
    y,
    N: tl.constexpr,
    K: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    HIGH_PLANE: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    PARTIAL: tl.constexpr,
    GELU: tl.constexpr,
    ELEMENT: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    TWOS_COMPLEMENT: tl.constexpr,
    UNIT: tl.constexpr,
    FACTOR: tl.constexpr,
    ASM: tl.constexpr,
    ASM_ODD: tl.constexpr,
    ASM_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECE: tl.constexpr,
    STEPS: tl.constexpr,
    BAND: tl.constexpr,
    IN_HALVES: tl.constexpr,
    JOINED: tl.constexpr,
):
    block_m, block_n = _place(rows, N, BLOCK_M, BLOCK_N, BAND)
    tokens = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the edge read the last one: loads need no mask, and the results are not stored.
    token_rows = tl.minimum(tokens, rows - 1).to(tl.int64)
    channel_rows = tl.minimum(channels, N - 1)

    pairs: tl.constexpr = 1 if HIGH_PLANE == 0 else 2
    part: tl.constexpr = TILE // (2 * pairs * STEPS)
    tiles: tl.constexpr = (K + CHUNK - 1) // CHUNK
    inside = tl.arange(0, part)
    octets = words.to(tl.pointer_type(tl.uint8)) + channel_rows.to(tl.int64)[:, None] * ROW_BYTES + inside[None, :]
    numbers = x + token_rows[None, :] * K
    # Places in a tile of the weights that a step's octets hold: their low fields', then their high fields'.
    places = tl.arange(0, 2 * part)
    places = places // part * (TILE // 2) + places % part

    acc_type: tl.constexpr = tl.int32 if ELEMENT == "int8" else tl.float32
    sum_type: tl.constexpr = tl.float32 if PARTIAL == "scales" else acc_type
    is_summed: tl.constexpr = PARTIAL == "" or PARTIAL == "folded"
    acc = tl.zeros([BLOCK_N, BLOCK_M], sum_type)
    for step in range(tiles * STEPS):
        tile = step // STEPS
        factors = load_column_of_factors(
            multipliers, weight_scales, block_n * BLOCK_N, tile, N, BLOCK_N, tiles, GROUP_TILES, PARTIAL, IN_HALVES
        )  # fmt: skip
        partial = acc if is_summed else tl.zeros([BLOCK_N, BLOCK_M], acc_type)
        for pair in tl.static_range(pairs):
            first = step % STEPS * part + pair * part
            low = tl.load(octets + (tile * (TILE // 2) + first))
            high = tl.load(octets + (HIGH_PLANE + tile * (TILE // 4))) if HIGH_PLANE > 0 else low
            left, right = decode(
                low, high, factors.to(tl.int32), ASM if pair == 0 else ASM_ODD, pair, PARTIAL == "folded", ELEMENT,
                EXPONENT_BITS, MANTISSA_BITS, TWOS_COMPLEMENT, UNIT,
            )  # fmt: skip
            # No promotion within a dot (max_num_imprecise_acc): PARTIAL decides about it.
            if JOINED:
                place = first + places[:, None]
                loaded = load_x(numbers, tile, place, K, tiles * CHUNK, TILE, CHUNK, ELEMENT, ASM, ASM_X)
                partial = tl.dot(side_by_side(left, right), loaded, partial, out_dtype=acc_type)
            else:
                place = first + inside[:, None]
                left_x = load_x(numbers, tile, place, K, tiles * CHUNK, TILE, CHUNK, ELEMENT, ASM, ASM_X)
                partial = tl.dot(left, left_x, partial, out_dtype=acc_type)
                place += TILE // 2
                right_x = load_x(numbers, tile, place, K, tiles * CHUNK, TILE, CHUNK, ELEMENT, ASM, ASM_X)
                partial = tl.dot(right, right_x, partial, out_dtype=acc_type)
        if is_summed:
            acc = partial
        elif PARTIAL == "promote":
            acc += partial
        else:
            acc = scaled_sum(partial.to(sum_type), factors.to(sum_type), acc)
    store(
        acc, block_m * BLOCK_M, channels, x_scales, weight_scales, bias, residual, gate, rows, rows_per_sample, y,
        BLOCK_M, BLOCK_N, PIECE, N, PARTIAL == "scales", GELU, FACTOR,
    )  # fmt: skip


@triton.jit
def _place(rows, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """Row and column of this program's tile: bands of BAND rows are walked column by column, so that programs that run
    at the same time share their operands in L2."""
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    first = program // (BAND * columns) * BAND
    height = tl.minimum((rows + BLOCK_M - 1) // BLOCK_M - first, BAND)
    inside = program % (BAND * columns)
    return first + inside % height, inside // height


@triton.jit
def packed_linear_split(
    x,
    x_scales,
    words,
    weight_scales,
    multipliers,
    bias,
    residual,
    gate,
    rows,
    rows_per_sample,
    y,
    N: tl.constexpr,
    K: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    HIGH_PLANE: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    PARTIAL: tl.constexpr,
    GELU: tl.constexpr,
    ELEMENT: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    TWOS_COMPLEMENT: tl.constexpr,
    UNIT: tl.constexpr,
    FACTOR: tl.constexpr,
    ASM: tl.constexpr,
    ASM_ODD: tl.constexpr,
    ASM_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """For few tokens, where reading the weights is all: few channels a program, K shared out among its warps.

    4608 × 1152 weights are 2.7 MB, 0.8 µs of an H100's memory bandwidth (10.6 MB and 3.2 µs in BF16), so that latency
    decides: 16 channels a program occupy the GPU even for N = 1152, and SPLITS warps keep several tiles each in flight.
    Tile t is split t mod SPLITS's; their sums meet in shared memory.
    """
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first_token = tl.program_id(0) // columns * BLOCK_M
    tokens = first_token + tl.arange(0, BLOCK_M)
    channels = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    token_rows = tl.minimum(tokens, rows - 1).to(tl.int64)
    channel_rows = tl.minimum(channels, N - 1)

    pairs: tl.constexpr = 1 if HIGH_PLANE == 0 else 2
    part: tl.constexpr = TILE // (2 * pairs)
    tiles: tl.constexpr = (K + CHUNK - 1) // CHUNK
    is_even: tl.constexpr = tiles % SPLITS == 0
    ends_at: tl.constexpr = (tiles + SPLITS - 1) // SPLITS * SPLITS * CHUNK
    inside = tl.arange(0, part)
    splits = tl.arange(0, SPLITS)
    octets = (
        words.to(tl.pointer_type(tl.uint8))
        + channel_rows.to(tl.int64)[None, :, None] * ROW_BYTES
        + inside[None, None, :]
    )
    numbers = x + token_rows[None, None, :] * K

    acc_type: tl.constexpr = tl.int32 if ELEMENT == "int8" else tl.float32
    sum_type: tl.constexpr = tl.float32 if PARTIAL == "scales" else acc_type
    is_summed: tl.constexpr = PARTIAL == "" or PARTIAL == "folded"
    acc = tl.zeros([SPLITS, BLOCK_N, BLOCK_M], sum_type)
    for step in range((tiles + SPLITS - 1) // SPLITS):
        tile = step * SPLITS + splits
        in_row = (tile < tiles)[:, None, None]
        held = tl.minimum(tile, tiles - 1)[:, None]
        factors = load_group_factors(
            multipliers, weight_scales, channel_rows[None, :], held, tiles, GROUP_TILES, PARTIAL
        )
        partial = acc if is_summed else tl.zeros([SPLITS, BLOCK_N, BLOCK_M], acc_type)
        for pair in tl.static_range(pairs):
            # Tiles behind the row's end are zeros.
            low_octets = octets + (tile * (TILE // 2) + pair * part)[:, None, None]
            low = tl.load(low_octets) if is_even else tl.load(low_octets, mask=in_row, other=0)
            high = low
            if HIGH_PLANE > 0:
                high_octets = octets + (HIGH_PLANE + tile * (TILE // 4))[:, None, None]
                high = tl.load(high_octets) if is_even else tl.load(high_octets, mask=in_row, other=0)
            left, right = decode(
                low, high, factors[:, :, None].to(tl.int32), ASM if pair == 0 else ASM_ODD, pair, PARTIAL == "folded",
                ELEMENT, EXPONENT_BITS, MANTISSA_BITS, TWOS_COMPLEMENT, UNIT,
            )  # fmt: skip
            place = pair * part + inside[None, :, None]
            left_x = load_x(numbers, tile[:, None, None], place, K, ends_at, TILE, CHUNK, ELEMENT, ASM, ASM_X)
            partial = tl.dot(left, left_x, partial, out_dtype=acc_type)
            right_x = load_x(
                numbers, tile[:, None, None], place + TILE // 2, K, ends_at, TILE, CHUNK, ELEMENT, ASM, ASM_X
            )
            partial = tl.dot(right, right_x, partial, out_dtype=acc_type)
        if is_summed:
            acc = partial
        elif PARTIAL == "promote":
            acc += partial
        else:
            acc = scaled_sum(partial.to(sum_type), factors[:, :, None].to(sum_type), acc)
    store(
        tl.sum(acc, 0), first_token, channels, x_scales, weight_scales, bias, residual, gate, rows, rows_per_sample,
        y, BLOCK_M, BLOCK_N, PIECE, N, PARTIAL == "scales", GELU, FACTOR,
    )  # fmt: skip
