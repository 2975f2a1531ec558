"""Lowering for TensorRT with plugins: quantizers and linears become one operator of ours each, weights stay packed."""

from __future__ import annotations

import onnx_graphsurgeon as gs
from onnx import helper

from exporter.container_choice import has_kernel
from exporter.packed_weights import CodedWeight, pack_weight
from exporter.passes.choose import scheme_of
from exporter.passes.lowering import Layer, layer_of, read_by_gemms
from exporter.passes.surgery import producer, variant_of
from exporter.targets import Target
from plugins.domain import DOMAIN
from plugins.op import OnlineQuantize, TokenQuantize
from plugins.packed_linear.descriptor import WEIGHT_ONLY

# The compute type comes later, when all is fused (`use_compute_type`).
_FLOAT = "fp32"


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
    weight = CodedWeight(gemm.weight_format, layer.codes(), layer.weight_scales, layer.multipliers, gemm.group_size)
    quantized = gemm.quantizes_activations
    packed = pack_weight(
        layer.name,
        weight,
        layer.container if quantized else WEIGHT_ONLY,
        gemm.activation_format if quantized else None,
        has_bias=gemm.has_bias,
    )
    tensors: dict[str, gs.Tensor | None] = {
        "x": layer.x,
        "numbers": layer.x,
        "x_scales": node.inputs[1],
        "words": gs.Constant(f"{layer.name}.packed", packed.words),
        "weight_scales": gs.Constant(f"{layer.name}.sum_scales", packed.weight_scales),
        "bias": layer.bias,
    }
    if packed.multipliers is not None:
        tensors["multipliers"] = gs.Constant(f"{layer.name}.factors", packed.multipliers)
    node.inputs.clear()
    node.outputs.clear()
    variant = packed.variant
    inputs = [tensors[name] for name in variant.input_names]
    attributes = variant.attributes(layer=layer.name)
    return gs.Node(variant.op_type, layer.name, attributes, inputs, [layer.y], domain=DOMAIN)
