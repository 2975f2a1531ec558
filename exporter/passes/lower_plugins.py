"""Lowering for TensorRT with plugins: quantizers and linears become one operator of ours each, weights stay packed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx import helper

from exporter.container_choice import has_kernel
from exporter.errors import InputError
from exporter.passes.choose import scheme_of
from exporter.passes.lowering import Layer, layer_of, read_by_gemms
from exporter.passes.surgery import producer, variant_of
from exporter.targets import Target
from plugins.containers import INT8
from plugins.domain import DOMAIN
from plugins.formats import get_format
from plugins.op import OnlineQuantize, PackedLinear, TokenQuantize
from plugins.packed_linear.descriptor import WEIGHT_ONLY, GroupFactors
from plugins.token_quantize.reference import number_factor

# The compute type comes later, when all is fused (`use_compute_type`).
_FLOAT = "fp32"
_MAX_MULTIPLIER = np.iinfo(np.int8).max


def lower_to_plugins(graph: gs.Graph, target: Target) -> int:
    """FloatQuantizeOnline → TokenQuantize, FloatGemm → PackedLinear, when there is a kernel of ours for the layer.

    A quantizer goes with its readers, which are of one kind (`separate_containers`). "<layer>.values" becomes the
    container's numbers. Weights are packed as the kernel reads them; every power of two between numbers and values is
    in the weight scales, exactly. Group multipliers beyond a byte become group scales. Layers without a kernel stay
    for `lower_to_tensorrt`.
    """
    changed = 0
    for index, node in enumerate(graph.nodes):
        layer = layer_of(node)
        if layer is None or not has_kernel(scheme_of(node, layer.gemm), layer.gemm.count):
            continue
        if layer.gemm.quantizes_activations:
            quantizer = producer(layer.x)
            if quantizer is None or not _makes_numbers(graph, quantizer):
                continue
            changed += _lower_quantizer(quantizer, layer.container)
        graph.nodes[index] = _packed_linear(node, layer)
        changed += 1
    return changed


def _makes_numbers(graph: gs.Graph, node: gs.Node) -> bool:
    """Whether the node quantizes to a container's numbers, or may be turned into one that does."""
    if variant_of(node, TokenQuantize) is not None:
        return True
    return variant_of(node, OnlineQuantize) is not None and read_by_gemms(graph, node)


def _lower_quantizer(node: gs.Node, container: str) -> int:
    """Turn the quantizer into one that makes the container's numbers, if it is not one yet; how many were turned."""
    variant = variant_of(node, OnlineQuantize)
    if variant is None:
        return 0
    numbers = TokenQuantize(variant.format, container, _FLOAT, int(node.inputs[0].shape[-1]))
    node.op, node.attrs = numbers.op_type, numbers.attributes(layer=node.attrs["layer"])
    node.outputs[0].dtype = helper.tensor_dtype_to_np_dtype(numbers.output_types["numbers"])
    return 1


def _packed_linear(node: gs.Node, layer: Layer) -> gs.Node:
    gemm = layer.gemm
    scales, multipliers = _scales(layer)
    factors: GroupFactors = "" if not gemm.group_size else "scales" if multipliers is None else "multipliers"
    variant = PackedLinear(
        weight_format=gemm.weight_format,
        container=layer.container if gemm.quantizes_activations else WEIGHT_ONLY,
        float_type=_FLOAT,
        n=len(layer.weight_scales),
        k=gemm.count,
        group_size=gemm.group_size,
        group_factors=factors,
        has_bias=gemm.has_bias,
    )
    tensors: dict[str, gs.Tensor | None] = {
        "x": layer.x,
        "numbers": layer.x,
        "x_scales": node.inputs[1],
        "words": gs.Constant(f"{layer.name}.packed", variant.layout.pack(layer.codes())),
        "weight_scales": gs.Constant(f"{layer.name}.sum_scales", _scales_of_sums(layer, scales)),
        "bias": layer.bias,
    }
    if multipliers is not None:
        tensors["multipliers"] = gs.Constant(f"{layer.name}.factors", multipliers)
    node.inputs.clear()
    node.outputs.clear()
    inputs = [tensors[name] for name in variant.input_names]
    attributes = variant.attributes(layer=layer.name)
    return gs.Node(variant.op_type, layer.name, attributes, inputs, [layer.y], domain=DOMAIN)


def _scales(layer: Layer) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8] | None]:
    """The scales, per channel or per group, and the groups' multipliers."""
    if layer.multipliers is None:
        return layer.weight_scales, None
    if layer.multipliers.max() <= _MAX_MULTIPLIER:
        return layer.weight_scales, layer.multipliers.astype(np.int8)
    # A channel's scale has so few bits that its product with a multiplier is exact.
    return layer.weight_scales * layer.multipliers.astype(np.float32), None


def _scales_of_sums(layer: Layer, scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The scales that sums of the container's numbers get: in INT8 both operands are numerators, in floats weights are
    values. Raises `InputError` where FP32 does not hold one.
    """
    unit = layer.format.step if layer.container == INT8.name else 1.0
    if layer.gemm.quantizes_activations:
        unit /= number_factor(get_format(layer.gemm.activation_format), layer.container)
    of_sums: npt.NDArray[np.float32] = scales * np.float32(unit)
    if not np.array_equal(of_sums / np.float32(unit), scales):
        raise InputError(
            f"{layer.name}: some of its weight scales are too small for {layer.container} products in FP32; keep the "
            "layer in high precision with a rule `weight: none`"
        )
    return of_sums
