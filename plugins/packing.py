"""Codes of 3, 4, 6 and 8 bits in INT32 words.

A row (the last axis) is one little-endian bit stream, least significant bit first: eight 4-bit codes a word with
the low nibble first, sixteen 6-bit codes or thirty-two 3-bit codes in three words. Each row is padded with zero bits to
a whole word.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from plugins.body import Body

WORD_BITS = 32
_NIBBLE_BITS = 4
_OCTET_BITS = 8
_NIBBLES_PER_WORD = WORD_BITS // _NIBBLE_BITS
PACKED_BITS = (3, 4, 6, 8)


class PackingError(ValueError):
    """Codes or words that do not fit together with the stated width and count."""


def words_per_row(count: int, bits: int) -> int:
    """INT32 words that hold `count` codes of `bits` bits."""
    _check_bits(bits)
    return -(-count * bits // WORD_BITS)


def pack(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """INT32 [..., words_per_row(K, bits)] from uint8 [..., K]. Raises PackingError."""
    _check_bits(bits)
    if codes.dtype != np.uint8 or codes.ndim == 0:
        raise PackingError(f"codes must be uint8 [..., K], not {codes.dtype} {list(codes.shape)}")
    if codes.size and int(codes.max()) >= 2**bits:
        raise PackingError(f"code {int(codes.max())} does not fit {bits} bits; largest: {2**bits - 1}")
    lead, count = codes.shape[:-1], codes.shape[-1]
    if bits == _NIBBLE_BITS:
        whole = np.pad(codes, [(0, 0)] * len(lead) + [(0, -count % _NIBBLES_PER_WORD)])
        return (whole[..., 0::2] | whole[..., 1::2] << _NIBBLE_BITS).view("<i4").astype(np.int32, copy=False)
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little").reshape(*lead, count * bits)
    padding = words_per_row(count, bits) * WORD_BITS - count * bits
    padded = np.pad(stream, [(0, 0)] * len(lead) + [(0, padding)])
    return np.packbits(padded, axis=-1, bitorder="little").view("<i4").astype(np.int32, copy=False)


def unpack(words: npt.NDArray[np.int32], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """uint8 [..., count] from INT32 [..., words_per_row(count, bits)]: the inverse of `pack`. Raises PackingError."""
    if words.dtype != np.int32 or words.ndim == 0:
        raise PackingError(f"words must be int32 [..., W], not {words.dtype} {list(words.shape)}")
    if words.shape[-1] != words_per_row(count, bits):
        raise PackingError(
            f"{count} codes of {bits} bits take {words_per_row(count, bits)} words, not {words.shape[-1]}"
        )
    octets = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)
    if bits == _NIBBLE_BITS:
        nibbles = np.empty((*octets.shape[:-1], octets.shape[-1] * 2), np.uint8)
        np.bitwise_and(octets, 0xF, out=nibbles[..., 0::2])
        np.right_shift(octets, _NIBBLE_BITS, out=nibbles[..., 1::2])
        return np.ascontiguousarray(nibbles[..., :count])
    stream = np.unpackbits(octets, axis=-1, count=count * bits, bitorder="little")
    codes = stream.reshape(*words.shape[:-1], count, bits)
    return np.packbits(codes, axis=-1, bitorder="little")[..., 0]


def unpack_nodes(words_name: str, codes_name: str, prefix: str, bits: int, count: int) -> list[onnx.NodeProto]:
    """`unpack` of a matrix in standard operators: INT32 [N, W] `words_name` to INT64 [N, count] `codes_name`.

    Division and remainder instead of shifts and masks, which TensorRT does not parse. Every tensor in between, and
    every node, is named `prefix`….
    """
    body = Body(prefix)
    words = _unsigned(body, words_name)
    straddle = WORD_BITS % bits != 0
    codes = _from_octets(body, words, bits, count) if straddle else _digits(body, words, 2**bits, WORD_BITS // bits)
    body.op("Slice", codes, body.ints(0), body.ints(count), body.ints(1), output=codes_name)
    return body.nodes


def append_octets(body: Body, words: str) -> str:
    """INT32 words [N, W] → their octets INT64 [N, 4W], lowest first."""
    return _digits(body, _unsigned(body, words), 2**_OCTET_BITS, WORD_BITS // _OCTET_BITS)


def _unsigned(body: Body, words: str) -> str:
    """INT32 → INT64 from 0 to 2³² − 1."""
    return body.op("Mod", body.op("Cast", words, to=TensorProto.INT64), body.ints(2**WORD_BITS))


def _digits(body: Body, numbers: str, radix: int, count: int) -> str:
    """[N, M * count]: the `count` lowest digits, lowest first, of the non-negative numbers [N, M]."""
    columns = body.op("Unsqueeze", numbers, body.ints(-1))
    shifted = body.op("Div", columns, body.ints(*(radix**digit for digit in range(count))))
    return body.op("Reshape", body.op("Mod", shifted, body.ints(radix)), body.ints(0, -1))


def _from_octets(body: Body, words: str, bits: int, count: int) -> str:
    """Codes of 3 or 6 bits, some of which lie in two words; three octets hold whole ones, three words whole triples."""
    missing = -words_per_row(count, bits) % 3
    if missing:
        words = body.op("Pad", words, body.ints(0, 0, 0, missing))
    octets = _digits(body, words, 2**8, 4)
    triples = body.op("Reshape", octets, body.ints(0, -1, 3))
    weighted = body.op("Mul", triples, body.ints(1, 2**8, 2**16))
    return _digits(body, body.op("ReduceSum", weighted, body.ints(-1), keepdims=0), 2**bits, 24 // bits)


def _check_bits(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise PackingError(f"codes of {bits} bits are not packed; valid: {', '.join(map(str, PACKED_BITS))}")
