"""The weight decoder in standard ONNX operators."""

from __future__ import annotations

from onnx import TensorProto

from plugins.body import Body
from plugins.formats import Format
from plugins.packing import unpack_nodes


def append_decode(body: Body, stored: str, fmt: Format, count: int, packed: bool) -> str:
    """Codes uint8 [N, K], or INT32 words [N, W], → values float32 [N, K]."""
    if packed:
        codes = f"{body.prefix}codes"
        body.nodes.extend(unpack_nodes(stored, codes, f"{body.prefix}unpack_", fmt.bits, count))
    else:
        codes = body.op("Cast", stored, to=TensorProto.INT64)
    return body.op("Gather", body.constant(fmt.values), codes, axis=0)


def append_per_group(
    body: Body, matrix: str, factors: str, count: int, group_size: int, output: str | None = None
) -> str:
    """matrix f32 [N, count] times factors f32 [N, count/group_size], or [N, 1] for group size 0."""
    if group_size == 0:
        return body.op("Mul", matrix, factors, output=output)
    grouped = body.op("Reshape", matrix, body.ints(0, count // group_size, group_size))
    scaled = body.op("Mul", grouped, body.op("Unsqueeze", factors, body.ints(-1)))
    return body.op("Reshape", scaled, body.ints(0, count), output=output)
