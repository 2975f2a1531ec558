"""NVFP4 and MXFP8 in float32, for ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from exporter.passes.lower_blocks import FP4_QUANTIZE, MXFP8_DEQUANTIZE, MXFP8_QUANTIZE
from exporter.passes.surgery import Splicer, array_of, producer
from exporter.targets import Target
from plugins.block_quantize.function_body import append_per_block, append_quantize_blocks
from plugins.block_scales import BLOCK_SCALINGS
from plugins.body import Body


def emulate_blocks(graph: gs.Graph, target: Target) -> int:
    """TRT_FP4DynamicQuantize, TRT_MXFP8DynamicQuantize and what dequantizes blocks → their definitions in float32.

    Dequantizers of FP8 values with one scale, of INT4 and of INT8 stay: ONNX Runtime has them.
    """
    splicer = Splicer()
    nodes: list[gs.Node] = []
    changed = 0
    # All are found before the first is replaced: what a node means depends on who computes its input.
    for node, body in [(node, _definition(node)) for node in graph.nodes]:
        nodes += [node] if body is None else splicer.nodes(body, _operands(node))
        changed += body is not None
    graph.nodes = nodes
    return changed


def _definition(node: gs.Node) -> Body | None:
    """The node in standard operators of float32, between tensors called in0, in1, out0, out1; None if it may stay."""
    body = Body(f"{node.name}.")
    if node.op == FP4_QUANTIZE:
        append_quantize_blocks(body, "in0", "in1", "out0", "out1", BLOCK_SCALINGS["nvfp4"], scales_on_grid=True)
    elif node.op == MXFP8_QUANTIZE:
        append_quantize_blocks(body, "in0", None, "out0", "out1", BLOCK_SCALINGS["mx"])
    elif node.op == MXFP8_DEQUANTIZE or (node.op == "DequantizeLinear" and _dequantizes_fp4(node)):
        _append_dequantizer(body, node)
    elif node.op == "DequantizeLinear" and _is_by(node.inputs[0], FP4_QUANTIZE):
        body.op("Mul", "in0", "in1", output="out0")
    else:
        return None
    return body


def _append_dequantizer(body: Body, node: gs.Node) -> None:
    """in0 [..., K] · in1 [..., K/G] → out0, or along the first of two axes."""
    size = node.attrs["block_size"]
    if node.attrs["axis"] == -1:
        append_per_block(body, "in0", "in1", size, output="out0")
        return
    rows = body.op("Transpose", "in0", perm=[1, 0])
    scales = body.op("Transpose", "in1", perm=[1, 0])
    body.op("Transpose", append_per_block(body, rows, scales, size), perm=[1, 0], output="out0")


def _dequantizes_fp4(node: gs.Node) -> bool:
    values = node.inputs[0]
    array = array_of(values)
    if array is None:
        return bool(node.attrs.get("block_size", 0)) and _is_by(values, FP4_QUANTIZE)
    return str(array.dtype) == "float4_e2m1fn"


def _is_by(tensor: gs.Tensor, op_type: str) -> bool:
    node = producer(tensor)
    return node is not None and node.op == op_type


def _operands(node: gs.Node) -> dict[str, gs.Tensor]:
    """The node's tensors by the names that definitions use, taken from it; constants of small types as float32."""
    inputs = {f"in{index}": _as_float32(tensor) for index, tensor in enumerate(node.inputs)}
    outputs = {f"out{index}": tensor for index, tensor in enumerate(node.outputs)}
    node.inputs.clear()
    node.outputs.clear()
    return inputs | outputs


def _as_float32(tensor: gs.Tensor) -> gs.Tensor:
    array = array_of(tensor)
    if array is None or array.dtype == np.float32:
        return tensor
    if array.dtype == np.uint8:
        array = BLOCK_SCALINGS["mx"].scales.decode(array)
    return gs.Constant(f"{tensor.name}.float32", array.astype(np.float32))
