"""Weights for TensorRT's own kernels: constants of the container, or of 4 bits and operators that decode them.

TensorRT-RTX 1.7 folds what has constant inputs, but not a DequantizeLinear of INT4, so that what follows one is in the
engine. Other builders have not been seen with it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx import TensorProto

from exporter.byte_tables import look_up
from exporter.errors import InputError
from exporter.layer_bytes import is_packable
from exporter.passes.lower_blocks import append_block_weight
from exporter.passes.lowering import Layer
from exporter.passes.surgery import Splicer, low_bit_constant
from plugins.body import Body
from plugins.containers import FP8
from plugins.formats import Format

_NOT_EXACT = "the weights are not exact in {}"


def append_weight(body: Body, layer: Layer, splicer: Splicer, *, packed: bool) -> tuple[str, dict[str, gs.Tensor]]:
    """The name of the weight [K, N] as the product takes it, and the tensors that are read for it.

    INT8, FP8 or INT4 constants and one DequantizeLinear, per channel or (INT4) per block. Where `packed`, those for
    INT8 and FP8 with no more than 4 bits are made of INT4 constants (`_append_expanded`). For block scaling see
    `lower_blocks`. Raises `InputError` for scales that TensorRT does not take.
    """
    if not (layer.weight_scales > 0).all():
        raise InputError(f"{layer.name}: some of its weight scales are not positive, which TensorRT does not take")
    if layer.gemm.scaling is not None:
        return append_block_weight(body, layer, layer.gemm.scaling)
    if packed and is_packable(layer.format, layer.container):
        return _append_expanded(body, layer, splicer)
    weight, scales = _weight(layer)
    constants: dict[str, gs.Tensor] = {"stored": weight, "row_scales": _constant(layer, "row_scales", scales)}
    if layer.container == "int4":
        size = layer.gemm.group_size
        return body.op("DequantizeLinear", "stored", "row_scales", axis=0, block_size=size), constants
    return body.op("DequantizeLinear", "stored", "row_scales", axis=1), constants


def zero_point(container: str) -> gs.Constant:
    """A zero point, which says what QuantizeLinear makes."""
    if container == "int8":
        return gs.Constant("zero.int8", np.zeros((), np.int8))
    return low_bit_constant("zero.fp8", np.zeros((), np.uint8), TensorProto.FLOAT8E4M3FN)


def _append_expanded(body: Body, layer: Layer, splicer: Splicer) -> tuple[str, dict[str, gs.Tensor]]:
    """QuantizeLinear(f(DequantizeLinear(INT4)) · multipliers), dequantized per channel.

    INT4 is the rank of a number among the format's, with its sign; f gives the numbers of the ranks. They are linear
    between two ranks, so that with n(r) the number of rank r, s(r) = n(r) − n(r − 1) and R the largest rank,
    f(r) = s(R)·r + Σ (s(i) − s(i + 1))·clip(r, −i, i) over 0 < i < R. For E2M1: 4r − clip(r, ±4) − 2·clip(r, ±6).
    All numbers are exact in float32: QuantizeLinear loses nothing. Raises ValueError where the container does not hold
    them all.
    """
    if layer.product is not None and not layer.product.holds_operands:
        raise ValueError(f"{layer.name}: {layer.product.reason}")
    unit = _unit(layer)
    ranks, slopes = _ranks(layer.format)
    scales = layer.weight_scales[:, 0] * np.float32(layer.format.step / unit)
    stored = look_up(ranks, np.ascontiguousarray(layer.codes().T))
    tensors: dict[str, gs.Tensor] = {
        "stored": low_bit_constant(f"{layer.name}.ranks", stored, TensorProto.INT4),
        "row_scales": _constant(layer, "row_scales", scales),
        "zero": splicer.shared(zero_point(layer.container)),
    }
    rank = body.op("DequantizeLinear", "stored", body.float(unit))
    numbers = body.op("Mul", rank, body.float(slopes[-1])) if slopes[-1] != 1 else rank
    for end, (slope, following) in enumerate(pairwise(slopes), start=1):
        if slope != following:
            clipped = body.op("Clip", rank, body.float(-end * unit), body.float(end * unit))
            numbers = body.op("Add", numbers, body.op("Mul", clipped, body.float(slope - following)))
    if layer.multipliers is not None:
        tensors["multipliers"] = _multipliers(layer, layer.multipliers)
        numbers = _append_multiplied(body, layer, numbers)
    numbers = body.op("QuantizeLinear", numbers, body.float(1.0), "zero")
    if layer.container != "int8":
        return body.op("DequantizeLinear", numbers, "row_scales", axis=1), tensors
    # Without it ONNX Runtime 1.31, which makes UINT8 of the INT8 between the two, gives the second one the scalar of
    # the first.
    tensors["zeros"] = splicer.shared(gs.Constant(f"zeros.int8.{len(scales)}", np.zeros(len(scales), np.int8)))
    return body.op("DequantizeLinear", numbers, "row_scales", "zeros", axis=1), tensors


def _append_multiplied(body: Body, layer: Layer, numbers: str) -> str:
    """numbers [K, N] times "multipliers" [G, 1, N], each for K / G of them."""
    count, size, features = layer.gemm.count, layer.gemm.group_size, len(layer.weight_scales)
    grouped = body.op("Reshape", numbers, body.ints(count // size, size, features))
    multipliers = body.op("DequantizeLinear", "multipliers", body.float(1.0))
    return body.op("Reshape", body.op("Mul", grouped, multipliers), body.ints(count, features))


def _multipliers(layer: Layer, multipliers: npt.NDArray[np.int32]) -> gs.Constant:
    """[G, 1, N] in the container, which holds them, since every format has a 1."""
    name, turned = f"{layer.name}.multipliers", multipliers.T[:, None]
    if layer.container == "int8":
        return gs.Constant(name, _exactly(turned, np.dtype(np.int8)))
    return low_bit_constant(name, _exactly(turned, FP8.dtype).view(np.uint8), TensorProto.FLOAT8E4M3FN)


def _ranks(fmt: Format) -> tuple[npt.NDArray[np.int8], list[int]]:
    """The signed rank of every code's number, as bytes, and how far the number of rank 1, 2, … is above the one before.

    Raises ValueError for a format that is not symmetric, or that has more than INT4 counts.
    """
    numerators = np.asarray(fmt.numerators, np.int64)
    magnitudes = np.unique(np.abs(numerators))
    if fmt.min_numerator != -fmt.max_numerator or len(magnitudes) > 8:
        raise ValueError(f"{fmt.name} has no ranks in INT4")
    ranks = (np.sign(numerators) * np.searchsorted(magnitudes, np.abs(numerators))).astype(np.int8)
    return ranks, [int(step) for step in np.diff(magnitudes)]


def _unit(layer: Layer) -> float:
    """What a number of the container is in the format's steps: 1, or a power of two in FP8."""
    if layer.container == "int8":
        return 1.0
    return _into_fp8(layer) * layer.format.step


def _into_fp8(layer: Layer) -> float:
    product = layer.product
    return (product.weight_factor if product else None) or 1.0


def _weight(layer: Layer) -> tuple[gs.Constant, npt.NDArray[np.float32]]:
    """The constant [K, N] and its scales: [N], or [K/G, N] for INT4's blocks."""
    name = f"{layer.name}.{layer.container}"
    scales = layer.weight_scales * np.float32(layer.format.step)
    numbers = layer.numerators().T
    if layer.container == "int4":
        return low_bit_constant(name, _exactly(numbers, np.dtype(np.int8)), TensorProto.INT4), scales.T
    if layer.container == "int8":
        return gs.Constant(name, _exactly(numbers, np.dtype(np.int8))), scales[:, 0]
    into = _into_fp8(layer)
    bits = _fp8_bits(numbers, into * layer.format.step)
    return low_bit_constant(name, bits, TensorProto.FLOAT8E4M3FN), layer.weight_scales[:, 0] / np.float32(into)


def _constant(layer: Layer, name: str, array: npt.NDArray[Any]) -> gs.Constant:
    dtype = np.float32 if array.dtype.kind == "f" else array.dtype
    return gs.Constant(f"{layer.name}.{name}", np.ascontiguousarray(array, dtype))


def _fp8_bits(numbers: npt.NDArray[np.signedinteger[Any]], unit: float) -> npt.NDArray[np.uint8]:
    """The bytes of numbers·unit in FP8, those of one byte by a table. Raises ValueError if one of them changes."""
    if numbers.itemsize > 1:
        return _exactly(numbers * unit, FP8.dtype).view(np.uint8)
    # From 0 to 127 and from −128 to −1, as a byte counts.
    values = np.arange(256, dtype=np.uint8).view(np.int8) * unit
    table = values.astype(FP8.dtype)
    exact = table.astype(values.dtype) == values
    numbers = np.ascontiguousarray(numbers)
    if not exact.all() and not look_up(exact, numbers).all():
        raise ValueError(_NOT_EXACT.format(FP8.dtype))
    return look_up(table.view(np.uint8), numbers)


def _exactly(numbers: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The numbers in a smaller type. Raises ValueError if one of them changes."""
    stored = np.ascontiguousarray(numbers.astype(dtype, copy=False))
    if numbers.dtype != dtype and not np.array_equal(stored.astype(numbers.dtype), numbers):
        raise ValueError(_NOT_EXACT.format(dtype))
    return stored
