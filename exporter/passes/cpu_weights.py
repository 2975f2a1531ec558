"""Weights for ONNX Runtime on a CPU: 4 bits each in the file, expanded once when the runtime loads it.

The nodes that expand them have constant inputs only, so the runtime folds them. They are few and cheap, a cast and a
table look-up, because a large model's load time is theirs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx import TensorProto

from exporter.passes.lowering import Layer
from exporter.passes.surgery import Splicer, low_bit_constant
from plugins.body import Body
from plugins.packing import unpack_nodes

_NIBBLE_BITS = 4
_BYTE_BITS = 8


def expanded_bytes(layer: Layer) -> npt.NDArray[np.int8]:
    """The weight's numerators times multipliers, int8 [K, N]. Raises ValueError if one does not fit."""
    numerators = layer.numerators().T
    stored = np.ascontiguousarray(numerators.astype(np.int8))
    if not np.array_equal(stored, numerators):
        raise ValueError(f"{layer.name}: its folded weights do not fit int8")
    return stored


def append_integer_weight(
    body: Body, layer: Layer, tensors: dict[str, gs.Tensor], splicer: Splicer, *, in_bytes: bool
) -> str:
    """Numerators times multipliers, int8 [K, N]: a constant if `in_bytes` or of 8 bits anyway, else expanded.

    int8 [k, n] = table[code [k, n], n], with a table of every numerator times the multiplier for every group: a look-up
    down its own column (GatherElements) costs ONNX Runtime a fifth of one in a table that all weights share (Gather).
    """
    if in_bytes or layer.format.bits == _BYTE_BITS:
        name = f"{layer.name}.int8"
        tensors[name] = gs.Constant(name, expanded_bytes(layer))
        return name
    codes = _append_codes(body, layer, tensors, splicer)
    numerators = layer.format.numerators.astype(np.int32)[:, None]
    if layer.multipliers is None:
        size = body.ints(len(numerators), len(layer.weight_scales))
        table = body.op("Expand", body.constant(numerators.astype(np.int8)), size)
        return body.op("GatherElements", table, codes, axis=0)
    steps = body.op("Cast", _multipliers(layer, tensors), to=TensorProto.INT32)
    table = body.op("Cast", body.op("Mul", steps, body.constant(numerators)), to=TensorProto.INT8)
    return _append_whole(body, layer, body.op("GatherElements", table, codes, axis=1))


def append_unscaled_weight(body: Body, layer: Layer, tensors: dict[str, gs.Tensor], splicer: Splicer) -> str:
    """Values times multipliers, f32 [K, N]: what exact sums are made of."""
    weight = _append_values(body, layer, tensors, splicer)
    if layer.multipliers is None:
        return weight
    steps = body.op("Cast", _multipliers(layer, tensors), to=TensorProto.FLOAT)
    return _append_whole(body, layer, body.op("Mul", weight, steps))


def append_float_weight(body: Body, layer: Layer, tensors: dict[str, gs.Tensor], splicer: Splicer) -> str:
    """Values times scales, f32 [K, N]; exact while the scales keep to 20 bits."""
    weight = _append_values(body, layer, tensors, splicer)
    scales = f"{layer.name}.weight_scales"
    grouped = layer.weight_scales.shape[1] > 1
    tensors[scales] = gs.Constant(
        scales, np.ascontiguousarray(layer.weight_scales.T[:, None] if grouped else layer.weight_scales.T)
    )
    if layer.multipliers is None and not grouped:
        return body.op("Mul", weight, scales)
    if layer.multipliers is not None:
        scales = body.op("Mul", scales, body.op("Cast", _multipliers(layer, tensors), to=TensorProto.FLOAT))
    return _append_whole(body, layer, body.op("Mul", weight, scales))


def _append_values(body: Body, layer: Layer, tensors: dict[str, gs.Tensor], splicer: Splicer) -> str:
    codes = _append_codes(body, layer, tensors, splicer)
    return body.op("Gather", body.constant(layer.format.values), codes, axis=0)


def _append_codes(body: Body, layer: Layer, tensors: dict[str, gs.Tensor], splicer: Splicer) -> str:
    """INT32 codes [K, N], or [G, K / G, N] for a layer with groups.

    The file has them in that shape: what the runtime folds it keeps until it has folded everything, so that every
    copy counts.
    """
    if layer.format.bits == _NIBBLE_BITS:
        name = f"{layer.stored.name.removesuffix('.codes').removesuffix('.words')}.u4"
        if name not in splicer:
            codes = np.ascontiguousarray(layer.codes().T).reshape(_shape(layer))
            splicer.shared(low_bit_constant(name, codes, TensorProto.UINT4))
        return body.op("Cast", name, to=TensorProto.INT32)
    tensors["stored"] = layer.stored
    unpacked = "stored"
    if layer.gemm.packed:
        unpacked = f"{body.prefix}codes"
        body.nodes += unpack_nodes("stored", unpacked, f"{body.prefix}unpack.", layer.format.bits, layer.gemm.count)
    turned = body.op("Transpose", body.op("Cast", unpacked, to=TensorProto.INT32), perm=[1, 0])
    return turned if len(_shape(layer)) == 2 else body.op("Reshape", turned, body.ints(*_shape(layer)))


def _shape(layer: Layer) -> tuple[int, ...]:
    """[G, K / G, N] where the groups of a row differ, else [K, N]."""
    count, features, size = layer.gemm.count, len(layer.weight_scales), layer.gemm.group_size
    grouped = layer.multipliers is not None or layer.weight_scales.shape[1] > 1
    return (count // size, size, features) if grouped else (count, features)


def _multipliers(layer: Layer, tensors: dict[str, gs.Tensor]) -> str:
    """One byte per group: uint8 [G, 1, N]."""
    if layer.multipliers is None:
        raise ValueError(f"{layer.name} has no multipliers")
    name = f"{layer.name}.multipliers.u8"
    tensors[name] = gs.Constant(name, np.ascontiguousarray(layer.multipliers.T[:, None].astype(np.uint8)))
    return name


def _append_whole(body: Body, layer: Layer, grouped: str) -> str:
    return body.op("Reshape", grouped, body.ints(layer.gemm.count, len(layer.weight_scales)))
