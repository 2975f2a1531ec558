"""Block scaling in TensorRT's own operators: NVFP4 and MXFP8, which Blackwell multiplies as they are."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from exporter.errors import InputError
from exporter.passes.lowering import Activation, Layer, Quantizer
from exporter.passes.surgery import Splicer, low_bit_constant
from plugins.block_scales import BlockScaling, factor_scales
from plugins.body import Body

BLOCKS_OPSET = 23
"""The first version of the standard operators whose DequantizeLinear takes FLOAT4E2M1."""

EXTENSION_DOMAIN = "trt"
FP4_QUANTIZE = "TRT_FP4DynamicQuantize"
MXFP8_QUANTIZE = "TRT_MXFP8DynamicQuantize"
MXFP8_DEQUANTIZE = "TRT_MXFP8DequantizeLinear"
EXTENSIONS = (FP4_QUANTIZE, MXFP8_QUANTIZE, MXFP8_DEQUANTIZE)
"""TensorRT's own operators, which its parser finds by name."""


def quantize_blocks(quantizer: Quantizer, scaling: BlockScaling, splicer: Splicer) -> tuple[list[gs.Node], Activation]:
    """FloatQuantizeBlocks → dynamic quantizer, and the dequantizers that a MatMul of the hardware's type is made of.

    fp4: TRT_FP4DynamicQuantize(x, tensor scale) → FP4 values and FP8 scales → DequantizeLinear of the scales, then of
    the values in blocks. mxfp8: TRT_MXFP8DynamicQuantize(x) → TRT_MXFP8DequantizeLinear.
    """
    size = scaling.group_size
    body = Body(f"{quantizer.layer}.quantize.{quantizer.container}.")
    tensors = {"x": quantizer.x, "values": quantizer.values, "scales": quantizer.scales}
    if quantizer.tensor_scale is None:
        _extension(body, MXFP8_QUANTIZE, ["x"], ["values", "scales"], size, output_dtype=TensorProto.FLOAT8E4M3FN)
        numbers = _mxfp8_dequantize(body, "values", "scales", -1, size)
    else:
        tensors["tensor_scale"] = quantizer.tensor_scale
        on_grid = f"{body.prefix}scales_on_grid"
        inputs = ["x", "tensor_scale"]
        _extension(body, FP4_QUANTIZE, inputs, ["values", on_grid], size, scale_type=TensorProto.FLOAT8E4M3FN)
        body.op("DequantizeLinear", on_grid, "tensor_scale", output="scales")
        numbers = body.op("DequantizeLinear", "values", "scales", axis=-1, block_size=size)
    tensors[numbers] = gs.Variable(numbers)
    return splicer.nodes(body, tensors), Activation(tensors[numbers], None)


def append_block_weight(body: Body, layer: Layer, scaling: BlockScaling) -> tuple[str, dict[str, gs.Constant]]:
    """The name of the weight [K, N] after its dequantizers, and the constants behind them.

    fp4: FLOAT4E2M1 codes, E4M3 scales and one FP32. mxfp8: E4M3 codes, and E8M0 scales as bytes, the only form in which
    the parser takes them. Raises `InputError` for scales that are not of the scaling's format.
    """
    factors = factor_scales(layer.weight_scales, scaling)
    if factors is None:
        raise InputError(
            f"{layer.name}: its weight scales are not {scaling.scale_format} values"
            f"{' times one float32' if scaling.has_tensor_scale else ''}, as {layer.container} needs; calibrate again"
        )
    tensor_scale, scale_codes = factors
    codes, scales = layer.codes().T, np.ascontiguousarray(scale_codes.T)
    name = f"{layer.name}.{layer.container}"
    if not scaling.has_tensor_scale:
        constants = {
            "stored": low_bit_constant(name, codes, TensorProto.FLOAT8E4M3FN),
            "block_scales": gs.Constant(f"{layer.name}.block_scales", scales),
        }
        return _mxfp8_dequantize(body, "stored", "block_scales", 0, scaling.group_size), constants
    constants = {
        "stored": low_bit_constant(name, codes, TensorProto.FLOAT4E2M1),
        "block_scales": low_bit_constant(f"{layer.name}.block_scales", scales, TensorProto.FLOAT8E4M3FN),
        "tensor_scale": gs.Constant(f"{layer.name}.tensor_scale", np.asarray(tensor_scale, np.float32)),
    }
    whole = body.op("DequantizeLinear", "block_scales", "tensor_scale")
    return body.op("DequantizeLinear", "stored", whole, axis=0, block_size=scaling.group_size), constants


def _mxfp8_dequantize(body: Body, values: str, scales: str, axis: int, size: int) -> str:
    output = f"{body.prefix}mxfp8_dequantized_{len(body.nodes)}"
    _extension(body, MXFP8_DEQUANTIZE, [values, scales], [output], size, axis=axis, output_dtype=TensorProto.FLOAT)
    return output


def _extension(
    body: Body, op_type: str, inputs: list[str], outputs: list[str], size: int, axis: int = -1, **attributes: int
) -> None:
    body.node(op_type, inputs, outputs, EXTENSION_DOMAIN, axis=axis, block_size=size, **attributes)
