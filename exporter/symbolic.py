"""What a quantized linear and a block boundary become while torch.export traces the model.

Each function emits the custom nodes of the waist through `torch.onnx.ops.symbolic`: one node per call, nothing is
computed. The nodes and their attributes are described by the operators' own rooms in `plugins`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.onnx.ops import symbolic, symbolic_multi_out

from plugins.block_quantize.descriptor import QuantizeBlocks
from plugins.domain import AttributeValue, Variant
from plugins.fake_quantize.descriptor import FakeQuantize
from plugins.float_dequantize.descriptor import DequantizeValues, DequantizeWeight
from plugins.float_quantize.descriptor import OnlineQuantize
from plugins.op import DOMAIN, OPSET_VERSION, Boundary

if TYPE_CHECKING:
    from exporter.quantize import QuantLinear


def is_traced() -> bool:
    """Whether torch.export traces the model, not strictly, as `exporter.tracing` does.

    What torch.compile traces is computed: Dynamo of PyTorch 2.11 and before folds `is_exporting` to true there.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def symbolic_linear(module: QuantLinear, x: Tensor) -> Tensor:
    """x [..., K] → quantize online → dequantize → linear with the dequantized words → [..., N]."""
    if module.activation_format != "none":
        x = _symbolic_quantized_input(module, x)
    variant = DequantizeWeight(
        format=module.weight_format, group_size=module.group_size, count=module.in_features, packed=True
    )
    attributes = variant.attributes(layer=module.layer, container=module.asked_container)
    weight = _node(variant, [module.words, module.scales], attributes, (module.out_features, module.in_features))
    return F.linear(x, weight, module.bias)


def _symbolic_quantized_input(module: QuantLinear, x: Tensor) -> Tensor:
    quantize: OnlineQuantize | QuantizeBlocks = OnlineQuantize(module.activation_format)
    groups = 1
    if module.scaling is not None:
        quantize, groups = QuantizeBlocks(module.scaling), module.in_features // module.scaling.group_size
    values, scales = symbolic_multi_out(
        f"{DOMAIN}::{quantize.op_type}",
        [x] if module.input_scale is None else [x, module.input_scale],
        attrs={**quantize.attributes(layer=module.layer)},
        dtypes=[torch.float32, torch.float32],
        shapes=[x.shape, (*x.shape[:-1], groups)],
        version=OPSET_VERSION,
    )
    dequantize = DequantizeValues(module.scaling.group_size if module.scaling else 0)
    return _node(dequantize, [values, scales], dequantize.attributes(layer=module.layer), x.shape)


def symbolic_fake_quantize(x: Tensor, layer: str, fmt: str, group_size: int) -> Tensor:
    """x [..., N] → rounded to the format and back: what becomes of the output of `layer`."""
    fake_quantize = FakeQuantize(fmt, group_size)
    return _node(fake_quantize, [x], fake_quantize.attributes(layer=layer), x.shape)


def symbolic_boundary(x: Tensor, name: str) -> Tensor:
    """Mark `x` so that a pass can give its ONNX tensor the name `name`; the identity otherwise."""
    boundary = Boundary()
    return _node(boundary, [x], boundary.attributes(name=name), x.shape, x.dtype)


def _node(
    variant: Variant,
    inputs: Sequence[Tensor],
    attributes: Mapping[str, AttributeValue],
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A node of the variant's type with one output."""
    return symbolic(
        f"{DOMAIN}::{variant.op_type}",
        inputs,
        attrs={**attributes},
        dtype=dtype,
        shape=shape,
        version=OPSET_VERSION,
    )
