"""The operands of a product: packed codes decoded in registers, and activations.

With assembly, four octets are one register (`asm.py` has the texts). Without it, as in Triton's interpreter, the same
numbers come from the formats' definition by integer arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode(
    low,
    high,
    multipliers,
    ASM: tl.constexpr,
    PAIR: tl.constexpr,
    FOLDED: tl.constexpr,
    ELEMENT: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    TWOS_COMPLEMENT: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Two tensors of numbers from octets `low` (two 4-bit fields each) and, for 6-bit codes, `high` (2-bit fields).

    With FOLDED, INT8 numbers are multiplied by `multipliers`, int32 [..., N, 1], which leaves them within ±127.
    """
    six_bits: tl.constexpr = EXPONENT_BITS + MANTISSA_BITS == 5
    if ASM == "":
        first = (low & 15).to(tl.int32)
        second = (low >> 4).to(tl.int32)
        if six_bits:
            octet = high.to(tl.int32)
            first = _six_bits(first, octet >> (2 * PAIR))
            second = _six_bits(second, octet >> (2 * PAIR + 4))
        left = _number(first, ELEMENT, EXPONENT_BITS, MANTISSA_BITS, TWOS_COMPLEMENT, UNIT)
        right = _number(second, ELEMENT, EXPONENT_BITS, MANTISSA_BITS, TWOS_COMPLEMENT, UNIT)
        if FOLDED:
            left = (left * multipliers).to(tl.int8)
            right = (right * multipliers).to(tl.int8)
    elif FOLDED:
        left, right = _assembly(ASM, "r,r,r,r,r", [low, multipliers], ELEMENT)
    elif six_bits:
        left, right = _assembly(ASM, "r,r", [low, high], ELEMENT)
    else:
        left, right = _assembly(ASM, "r", [low], ELEMENT)
    return left, right


@triton.jit
def side_by_side(left, right):
    """[N, K] and [N, K] to [N, 2·K]. Every thread has whole rows of an operand's registers: nothing is moved."""
    return tl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], 2 * left.shape[1])


@triton.jit
def _assembly(ASM: tl.constexpr, INPUTS: tl.constexpr, octets, ELEMENT: tl.constexpr):
    if ELEMENT == "int8":
        numbers = tl.inline_asm_elementwise(ASM, "=r,=r," + INPUTS, octets, (tl.int8, tl.int8), is_pure=True, pack=4)
    elif ELEMENT == "fp8e4nv":
        numbers = tl.inline_asm_elementwise(
            ASM, "=r,=r," + INPUTS, octets, (tl.float8e4nv, tl.float8e4nv), is_pure=True, pack=4
        )
    elif ELEMENT == "fp16":
        numbers = tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r," + INPUTS, octets, (tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        numbers = tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r," + INPUTS, octets, (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    return numbers


@triton.jit
def load_x(
    numbers,
    tile,
    place,
    K: tl.constexpr,
    ENDS_AT: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    ELEMENT: tl.constexpr,
    ASM: tl.constexpr,
    ASM_X: tl.constexpr,
):
    """Numbers of the operand's type at `place` of a tile's K, zero beyond its end. The last tile ends at ENDS_AT."""
    pointers = numbers + (tile * CHUNK + place)
    if ENDS_AT == K and CHUNK == TILE:
        loaded = tl.load(pointers)
    else:
        is_weighted = (place < CHUNK) & (tile * CHUNK + place < K)
        if numbers.dtype.element_ty.is_floating():
            loaded = tl.load(pointers, mask=is_weighted, other=0.0)
        else:
            loaded = tl.load(pointers, mask=is_weighted, other=0)
    if ELEMENT == "fp16" and loaded.dtype == tl.int8:
        loaded = _decode_x(loaded, ASM_X)
    elif ELEMENT == "bf16" and ASM == "":
        loaded = loaded.to(tl.float32)  # as the weights are, see `decode`
    return loaded


@triton.jit
def _decode_x(octets, ASM: tl.constexpr):
    """E4M3 bytes to FP16 numbers 2^-8 times their value: every code but NaN, exactly."""
    if ASM == "":
        bits = octets.to(tl.uint8, bitcast=True).to(tl.int32)
        return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.inline_asm_elementwise(ASM, "=r,=r,r", [octets], tl.float16, is_pure=True, pack=4)


@triton.jit
def _six_bits(low, high):
    """The stored field of a 6-bit code: sign, four low magnitude bits, top magnitude bit."""
    return ((high >> 1) & 1) | (low << 1) | ((high & 1) << 5)


@triton.jit
def _number(
    stored,
    ELEMENT: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    TWOS_COMPLEMENT: tl.constexpr,
    UNIT: tl.constexpr,
):
    if TWOS_COMPLEMENT:
        return (((stored ^ 8) - 8) * int(UNIT)).to(tl.int8)
    sign = stored & 1
    magnitude = stored >> 1
    if ELEMENT == "fp8e4nv":
        octet = (sign << 7) | (magnitude << (3 - MANTISSA_BITS))
        return octet.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    exponent = magnitude >> MANTISSA_BITS
    fraction = magnitude & ((1 << MANTISSA_BITS) - 1)
    normal = (fraction + (1 << MANTISSA_BITS)) << tl.maximum(exponent - 1, 0)
    numerator = tl.where(exponent == 0, fraction, normal)
    numerator = tl.where(sign == 1, -numerator, numerator)
    if ELEMENT == "int8":
        return numerator.to(tl.int8)
    # Triton's interpreter multiplies BF16 matrices as integers, so there they are float32.
    kind: tl.constexpr = tl.float16 if ELEMENT == "fp16" else tl.float32
    return (numerator.to(tl.float32) * UNIT).to(kind)
