"""The weight decoder in standard ONNX operators."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from plugins.body import Body
from plugins.formats import Format
from plugins.packing import WORD_BITS, append_octets, unpack_nodes

_PAIRED_BITS = 4
_PER_WORD = WORD_BITS // _PAIRED_BITS


def append_decode(body: Body, stored: str, fmt: Format, count: int, packed: bool) -> str:
    """Codes uint8 [N, K], or INT32 words [N, W], → values float32 [N, K]."""
    if packed and fmt.bits == _PAIRED_BITS:
        return _append_pairs(body, stored, fmt, count)
    if packed:
        codes = f"{body.prefix}codes"
        body.nodes.extend(unpack_nodes(stored, codes, f"{body.prefix}unpack_", fmt.bits, count))
    else:
        codes = body.op("Cast", stored, to=TensorProto.INT64)
    return body.op("Gather", body.constant(fmt.values), codes, axis=0)


def _append_pairs(body: Body, words: str, fmt: Format, count: int) -> str:
    """Every octet holds two codes, the low nibble first, and picks both values at once: half as many look-ups."""
    octets = np.arange(1 << 2 * _PAIRED_BITS)
    pairs = np.stack([fmt.values[octets & 15], fmt.values[octets >> _PAIRED_BITS]], axis=1)
    values = body.op("Gather", body.constant(pairs), append_octets(body, words), axis=0)
    row = body.op("Reshape", values, body.ints(0, -1))
    # Without the padding of the last word.
    return body.op("Slice", row, body.ints(0), body.ints(count), body.ints(1)) if count % _PER_WORD else row


def append_per_group(
    body: Body, matrix: str, factors: str, count: int, group_size: int, output: str | None = None
) -> str:
    """matrix f32 [N, count] times factors f32 [N, count/group_size], or [N, 1] for group size 0."""
    if group_size == 0:
        return body.op("Mul", matrix, factors, output=output)
    grouped = body.op("Reshape", matrix, body.ints(0, count // group_size, group_size))
    scaled = body.op("Mul", grouped, body.op("Unsqueeze", factors, body.ints(-1)))
    return body.op("Reshape", scaled, body.ints(0, count), output=output)
