"""What a quantized layer takes in the output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.targets import Target
from plugins.formats import Format, get_format
from plugins.packed_linear.layout import Layout
from plugins.packing import words_per_row

if TYPE_CHECKING:
    from exporter.plan import LayerPlan

_FP32_BYTES = 4
_NIBBLE_BITS = 4
_WORD_BYTES = 4


def stored_bytes(layer: LayerPlan, target: Target) -> int:
    """Expected size in the output: weights, scales, group multipliers and bias.

    Plugins have packed codes and a byte per group multiplier; so has what else can, where the target's storage is
    packed. Else weights are in their container, group scales folded in; block scales are a byte each there.
    """
    fmt = get_format(layer.weight_format)
    folded = layer.out_features * layer.groups if layer.scales == "foldable" else 0
    if layer.is_plugin(target):
        layout = Layout(fmt, layer.in_features, layer.group_size, twos_complement=False)
        weights = layer.out_features * layout.words * _WORD_BYTES
    elif _is_packed(fmt, layer.container, target):
        bits = fmt.bits if target.engine == "onnxruntime" else _NIBBLE_BITS
        weights = layer.out_features * words_per_row(layer.in_features, bits) * _WORD_BYTES
    else:
        weights = layer.out_features * layer.in_features // (2 if layer.container in ("int4", "fp4") else 1)
        folded = 0
    if layer.container in ("fp4", "mxfp8"):
        return weights + layer.out_features * (layer.groups + layer.has_bias * _FP32_BYTES)
    scales = layer.out_features * (1 if layer.scales in ("channel", "foldable") else layer.groups) * _FP32_BYTES
    return weights + folded + scales + layer.out_features * layer.has_bias * _FP32_BYTES


def _is_packed(fmt: Format, container: str, target: Target) -> bool:
    if target.engine == "onnxruntime":
        return target.storage == "packed" or container != "int8"
    return target.storage == "packed" and is_packable(fmt, container)


def is_packable(fmt: Format, container: str) -> bool:
    """Whether TensorRT's own kernels can have weights of the format as INT4, decoded into the container at run time."""
    return fmt.bits <= _NIBBLE_BITS and container in ("int8", "fp8")
