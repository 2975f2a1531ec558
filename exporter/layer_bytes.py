"""What a quantized layer takes in the output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.targets import Target
from plugins.formats import get_format
from plugins.packed_linear.layout import Layout
from plugins.packing import words_per_row

if TYPE_CHECKING:
    from exporter.plan import LayerPlan

_FP32_BYTES = 4
_WORD_BYTES = 4


def stored_bytes(layer: LayerPlan, target: Target) -> int:
    """Expected size in the output: weights, scales, group multipliers and bias.

    ONNX Runtime's file, and plugins, keep packed codes and a byte per group multiplier; TensorRT's own kernels have
    weights in their container, group scales folded in; block scales are a byte each there.
    """
    fmt = get_format(layer.weight_format)
    folded = layer.out_features * layer.groups if layer.scales == "foldable" else 0
    if layer.is_plugin(target):
        layout = Layout(fmt, layer.in_features, layer.group_size, twos_complement=False)
        weights = layer.out_features * layout.words * _WORD_BYTES
    elif target.engine == "onnxruntime":
        weights = layer.out_features * words_per_row(layer.in_features, fmt.bits) * _WORD_BYTES
    else:
        weights = layer.out_features * layer.in_features // (2 if layer.container in ("int4", "fp4") else 1)
        folded = 0
    if layer.container in ("fp4", "mxfp8"):
        return weights + layer.out_features * (layer.groups + layer.has_bias * _FP32_BYTES)
    scales = layer.out_features * (1 if layer.scales in ("channel", "foldable") else layer.groups) * _FP32_BYTES
    return weights + folded + scales + layer.out_features * layer.has_bias * _FP32_BYTES
