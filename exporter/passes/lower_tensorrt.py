"""Lowering for TensorRT and TensorRT-RTX without plugins: standard QuantizeLinear and DequantizeLinear, scale 1."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx import TensorProto

from exporter.byte_tables import look_up
from exporter.errors import InputError
from exporter.passes.encodings import unit_of
from exporter.passes.lower_blocks import BLOCKS_OPSET, EXTENSIONS, append_block_weight, quantize_blocks
from exporter.passes.lowering import Activation, FakeQuantizer, Layer, Quantizer, append_epilogue, lower
from exporter.passes.surgery import Splicer, low_bit_constant
from exporter.targets import Target
from plugins.body import Body
from plugins.containers import CONTAINERS, FP8, rounds_alike
from plugins.float_quantize.reference import TINY
from plugins.formats import FloatFormat, Format

_CONVERTED_TO = ("int8", "fp8")
"""Containers that QuantizeLinear makes with scale 1."""

_NOT_EXACT = "the weights are not exact in {}"


def lower_to_tensorrt(graph: gs.Graph, target: Target) -> int:
    """FloatQuantizeOnline, FloatQuantizeBlocks, FloatGemm → Q/DQ around a MatMul, by the layer's container;
    FloatFakeQuantize → the same Q/DQ, times the scales, where the target has a container for the format.

    Activations: x / token scale, rounded by ordinary operators where the container's own rounding is not the
    format's, then QuantizeLinear and DequantizeLinear with scale 1, which lose nothing. Weights: INT8, FP8 or INT4
    constants [K, N] and one DequantizeLinear, per channel or (INT4) per block. The product is multiplied by the
    token's scale. "<layer>.values" becomes the INT8 or FP8 tensor. For fp4 and mxfp8 see `lower_blocks`; a graph with
    them becomes one of operator version 23, the first that has FP4.
    """
    lowered = lower(graph, _quantize, _multiply, partial(_fake_quantize, target))
    if any(node.op in EXTENSIONS for node in graph.nodes):
        graph.opset, graph.import_domains = BLOCKS_OPSET, None
    return lowered


def _quantize(quantizer: Quantizer, splicer: Splicer) -> tuple[list[gs.Node], Activation]:
    if quantizer.scaling is not None:
        return quantize_blocks(quantizer, quantizer.scaling, splicer)
    container = quantizer.container
    body = Body(f"{quantizer.layer}.quantize.{container}.")
    t = _append_quotient(body, "x", "scales", quantizer.format, container)
    if not _container_rounds(quantizer.format, container):
        t = _append_rounding(body, t, quantizer.format, unit_of(quantizer.format, container))
    numbers = _append_conversions(body, t, "values")
    tensors = {
        "x": quantizer.x,
        "scales": quantizer.scales,
        "values": quantizer.values,
        "zero": splicer.shared(_zero(container)),
        numbers: gs.Variable(numbers),
    }
    return splicer.nodes(body, tensors), Activation(tensors[numbers], quantizer.scales)


def _fake_quantize(target: Target, quantizer: FakeQuantizer, splicer: Splicer) -> list[gs.Node]:
    """In a container of the target that rounds as the format does, else by ordinary operators."""
    fmt = quantizer.format
    container = next((name for name in target.containers if name in _CONVERTED_TO and _container_rounds(fmt, name)), "")

    def online(body: Body, x: str) -> tuple[str, str]:
        scales = f"{body.prefix}scales"
        t = _append_quotient(body, x, scales, fmt, container)
        if container:
            return _append_conversions(body, t, f"{body.prefix}values"), scales
        return _append_rounding(body, t, fmt, 1.0), scales

    return quantizer.nodes(splicer, online, **({"zero": splicer.shared(_zero(container))} if container else {}))


def _append_quotient(body: Body, x: str, scales: str, fmt: Format, container: str) -> str:
    """x → its token scales, and x / scales in the container's unit, no less than 0 for an unsigned format."""
    amax = body.op("ReduceMax", body.op("Abs", x) if fmt.min else x, body.ints(-1), keepdims=1)
    body.op("Div", body.op("Max", amax, body.float(TINY)), body.float(fmt.max / unit_of(fmt, container)), output=scales)
    t = body.op("Div", x, scales)
    return t if fmt.min else body.op("Max", t, body.float(0.0))


def _container_rounds(fmt: Format, container: str) -> bool:
    """Whether converting a quotient to the container rounds it as the format does."""
    return rounds_alike(fmt, CONTAINERS[container]) or (container == "int8" and fmt.is_uniform)


def _append_conversions(body: Body, t: str, values: str) -> str:
    """t → `values` in the type of "zero", and back."""
    body.op("QuantizeLinear", t, body.float(1.0), "zero", output=values)
    return body.op("DequantizeLinear", values, body.float(1.0), "zero")


def _append_rounding(body: Body, t: str, fmt: Format, unit: float) -> str:
    """t (values / unit) rounded to the format's grid: Round(t / step)·step, with the step of t's own binade.

    No splitting by addition and subtraction here: compilers for GPUs may contract or reorder floats.
    """
    step = fmt.step / unit
    steps = [step]
    if isinstance(fmt, FloatFormat):
        binades = int(np.log2(fmt.max / fmt.min_normal)) + 1
        steps = [step * 2.0**binade for binade in range(binades)]
    magnitude = body.op("Abs", t)
    chosen = body.float(steps[-1])
    for smaller in reversed(steps[:-1]):
        below = body.op("Less", magnitude, body.float(smaller * 2.0 ** (fmt.mantissa_bits + 1)))
        chosen = body.op("Where", below, body.float(smaller), chosen)
    return body.op("Mul", body.op("Round", body.op("Div", t, chosen)), chosen)


def _zero(container: str) -> gs.Constant:
    """A zero point, which says what QuantizeLinear makes."""
    if container == "int8":
        return gs.Constant("zero.int8", np.zeros((), np.int8))
    return low_bit_constant("zero.fp8", np.zeros((), np.uint8), TensorProto.FLOAT8E4M3FN)


def _multiply(layer: Layer, activation: Activation | None, splicer: Splicer) -> list[gs.Node]:
    body = Body(f"{layer.name}.")
    tensors = {"x": layer.x if activation is None else activation.numbers, "y": layer.y}
    decoded, constants = _decoded_weight(body, layer)
    tensors |= constants
    product = body.op("MatMul", "x", decoded)
    factors = []
    if activation is not None and activation.scales is not None:
        tensors["token_scales"] = activation.scales
        factors = ["token_scales"]
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    append_epilogue(body, product, factors, has_bias=layer.bias is not None)
    return splicer.nodes(body, tensors)


def _decoded_weight(body: Body, layer: Layer) -> tuple[str, dict[str, gs.Constant]]:
    """The name of the weight [K, N] as the product takes it, and the constants behind it."""
    if not (layer.weight_scales > 0).all():
        raise InputError(f"{layer.name}: some of its weight scales are not positive, which TensorRT does not take")
    if layer.gemm.scaling is not None:
        return append_block_weight(body, layer, layer.gemm.scaling)
    weight, scales = _weight(layer)
    constants = {"stored": weight, "row_scales": gs.Constant(f"{layer.name}.row_scales", scales)}
    if layer.container == "int4":
        size = layer.gemm.group_size
        return body.op("DequantizeLinear", "stored", "row_scales", axis=0, block_size=size), constants
    return body.op("DequantizeLinear", "stored", "row_scales", axis=1), constants


def _weight(layer: Layer) -> tuple[gs.Constant, npt.NDArray[np.float32]]:
    """The constant [K, N] and its scales: [N], or [K/G, N] for INT4's blocks."""
    name = f"{layer.name}.{layer.container}"
    scales = layer.weight_scales * np.float32(layer.format.step)
    numbers = layer.numerators().T
    if layer.container == "int4":
        return low_bit_constant(name, _exactly(numbers, np.dtype(np.int8)), TensorProto.INT4), _contiguous(scales.T)
    if layer.container == "int8":
        return gs.Constant(name, _exactly(numbers, np.dtype(np.int8))), _contiguous(scales[:, 0])
    product = layer.product
    into = (product.weight_factor if product else None) or 1.0
    bits = _fp8_bits(numbers, into * layer.format.step)
    scales = layer.weight_scales[:, 0] / np.float32(into)
    return low_bit_constant(name, bits, TensorProto.FLOAT8E4M3FN), _contiguous(scales)


def _contiguous(scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(scales, np.float32)


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
