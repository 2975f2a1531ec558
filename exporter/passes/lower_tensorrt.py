"""Lowering for TensorRT and TensorRT-RTX without plugins: standard QuantizeLinear and DequantizeLinear, scale 1."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from exporter.passes.encodings import unit_of
from exporter.passes.lower_blocks import BLOCKS_OPSET, EXTENSIONS, quantize_blocks
from exporter.passes.lowering import Activation, FakeQuantizer, Layer, Quantizer, append_epilogue, lower
from exporter.passes.surgery import Splicer
from exporter.passes.tensorrt_weights import append_weight, zero_point
from exporter.targets import Target
from plugins.body import Body
from plugins.containers import CONTAINERS, rounds_alike
from plugins.float_quantize.reference import TINY
from plugins.formats import FloatFormat, Format

_CONVERTED_TO = ("int8", "fp8")
"""Containers that QuantizeLinear makes with scale 1."""


def lower_to_tensorrt(graph: gs.Graph, target: Target) -> int:
    """FloatQuantizeOnline, FloatQuantizeBlocks, FloatGemm → Q/DQ around a MatMul, by the layer's container;
    FloatFakeQuantize → the same Q/DQ, times the scales, where the target has a container for the format.

    Activations: x / token scale, rounded by ordinary operators where the container's own rounding is not the
    format's, then QuantizeLinear and DequantizeLinear with scale 1, which lose nothing. Weights: see
    `tensorrt_weights`. The product is multiplied by the token's scale. "<layer>.values" becomes the INT8 or FP8 tensor.
    For fp4 and mxfp8 see `lower_blocks`; a graph with them becomes one of operator version 23, the first that has FP4.
    """
    lowered = lower(
        graph, _quantize, partial(_multiply, packed=target.storage == "packed"), partial(_fake_quantize, target)
    )
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
        "zero": splicer.shared(zero_point(container)),
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

    return quantizer.nodes(splicer, online, **({"zero": splicer.shared(zero_point(container))} if container else {}))


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


def _multiply(layer: Layer, activation: Activation | None, splicer: Splicer, *, packed: bool) -> list[gs.Node]:
    body = Body(f"{layer.name}.")
    tensors = {"x": layer.x if activation is None else activation.numbers, "y": layer.y}
    decoded, constants = append_weight(body, layer, splicer, packed=packed)
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
