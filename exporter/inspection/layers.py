"""The quantized layers of a graph with what is stored for them, or the linear layers of a plain one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx
from onnx import TensorProto

from exporter.describe import output_text
from exporter.layer_entries import layer_of, makers_of
from exporter.layer_rules import LINEAR
from exporter.onnx_input.constants import type_name
from exporter.onnx_input.linears import find_linears
from exporter.onnx_input.model import name_by_scope
from exporter.passes.driver import import_graph
from exporter.passes.layer_table import LayerEntry, OutputEntry, read_output_table
from plugins.op import DequantizeWeight, FakeQuantize, OnlineQuantize, is_ours, parse

UNKNOWN = "-"
"""Stands for what a graph does not say."""

_FUSED = ("residual", "gate")
"""Inputs of a layer's plugin that belong to what follows the layer."""

_BITS: Mapping[int, int] = {
    **dict.fromkeys((TensorProto.DOUBLE, TensorProto.INT64, TensorProto.UINT64), 64),
    **dict.fromkeys((TensorProto.FLOAT, TensorProto.INT32, TensorProto.UINT32), 32),
    **dict.fromkeys((TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT16, TensorProto.UINT16), 16),
    **dict.fromkeys((TensorProto.INT4, TensorProto.UINT4), 4),
}


@dataclass(frozen=True)
class LayerView:
    """One layer: what a `LayerEntry` says, and its weight as the file stores it.

    `encoding` is how its quantized activations travel, `output` the format that its output is rounded to (with
    groups as `e4m3/64`). `weight_bytes` and `stored_type` are those of the constant that holds the weight's codes or
    numbers; scales and bias are not counted.
    """

    layer: str
    weight_format: str
    activation_format: str
    scales: str
    group_size: int
    container: str
    in_features: int
    out_features: int
    weight_bytes: int
    stored_type: str
    encoding: str
    output: str = UNKNOWN


@dataclass(frozen=True)
class LayersView:
    """All layers; `quantized` is False where they are a plain model's. `parts` are the names of the constants that
    belong to quantized layers, `parameters` how many weights and biases those stand for."""

    layers: tuple[LayerView, ...]
    quantized: bool
    parts: frozenset[str]
    parameters: int


def bytes_of(tensor: TensorProto) -> int:
    """Size of a tensor's numbers in the file."""
    return -(-int(math.prod(tensor.dims)) * _BITS.get(tensor.data_type, 8) // 8)


def with_outputs(view: LayersView, model: onnx.ModelProto) -> LayersView:
    """The view with the formats that outputs of its layers are rounded to, by the graph's table or, without one, by its
    nodes."""
    entries = read_output_table(model) or [
        OutputEntry(layer_of(node), variant.format, variant.group_size, node.input[0], node.output[0])
        for node in model.graph.node
        if is_ours(node) and (variant := FakeQuantize.parse(node.op_type)) is not None
    ]
    formats = {entry.layer: output_text(entry.format, entry.group_size) for entry in entries}
    layers = (replace(layer, output=formats.get(layer.layer.removesuffix(LINEAR), UNKNOWN)) for layer in view.layers)
    return replace(view, layers=tuple(layers))


def table_layers(model: onnx.ModelProto, table: Sequence[LayerEntry]) -> LayersView:
    """The layers of a fused or lowered graph, found by the tensors that its table names."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = makers_of(model, table)
    views, parameters = [], 0
    parts: set[str] = set()
    for entry in table:
        found = dict(_constants_between(entry, makers, constants))
        weight = max((constants[name] for name in found), key=lambda tensor: math.prod(tensor.dims), default=None)
        biases = sum(math.prod(constants[name].dims) for name, is_bias in found.items() if is_bias)
        parameters += entry.in_features * entry.out_features + biases
        parts |= found.keys()
        views.append(
            LayerView(
                entry.layer,
                entry.weight_format,
                entry.activation_format,
                entry.scales,
                entry.group_size,
                entry.container or UNKNOWN,
                entry.in_features,
                entry.out_features,
                0 if weight is None else bytes_of(weight),
                UNKNOWN if weight is None else type_name(weight.data_type),
                entry.encoding if entry.values else UNKNOWN,
            )
        )
    return LayersView(tuple(views), True, frozenset(parts), parameters)


def _constants_between(
    entry: LayerEntry, makers: Mapping[str, onnx.NodeProto], constants: Mapping[str, TensorProto]
) -> Iterator[tuple[str, bool]]:
    """Names of the constants that the layer's output depends on past its input, and whether each is the bias."""
    seen, queue = {entry.input, entry.values, entry.token_scales}, [entry.output]
    while queue:
        node = makers.get(queue.pop())
        if node is None:
            continue
        variant = parse(node.op_type) if is_ours(node) else None
        roles = ("", "bias") if node.op_type == "Add" else variant.input_names if variant is not None else ()
        for index, name in enumerate(node.input):
            role = roles[index] if index < len(roles) else ""
            if name in seen or role in _FUSED:
                continue
            seen.add(name)
            if name in constants:
                yield name, role == "bias" and list(constants[name].dims) == [entry.out_features]
            else:
                queue.append(name)


def unfused_layers(model: onnx.ModelProto) -> LayersView:
    """The layers of a graph as torch.export traced it, where quantizers and products are still apart."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if is_ours(node)]
    activations = {
        layer_of(node): quantize.format
        for node in nodes
        if (quantize := OnlineQuantize.parse(node.op_type)) is not None
    }
    views, parts = [], set()
    for node in nodes:
        weight = DequantizeWeight.parse(node.op_type)
        if weight is None or node.input[0] not in constants:
            continue
        stored, layer = constants[node.input[0]], layer_of(node)
        parts |= set(node.input)
        views.append(
            LayerView(
                layer,
                weight.format,
                activations.get(layer, "none"),
                "group" if weight.group_size else "channel",
                weight.group_size,
                UNKNOWN,
                weight.count,
                int(stored.dims[0]),
                bytes_of(stored),
                type_name(stored.data_type),
                "float32" if layer in activations else UNKNOWN,
            )
        )
    parameters = sum(view.in_features * view.out_features for view in views)
    return LayersView(tuple(views), True, frozenset(parts), parameters)


def plain_layers(model: onnx.ModelProto) -> LayersView:
    """The linear layers of a model without the project's metadata, in the types that their weights are stored in."""
    name_by_scope(model)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    views = []
    for linear in find_linears(import_graph(model)):
        stored = constants.get(linear.constant.stored.name)
        if stored is None:  # in a Constant node
            continue
        name = type_name(stored.data_type)
        views.append(
            LayerView(
                linear.name,
                name.lower(),
                UNKNOWN,
                UNKNOWN,
                0,
                UNKNOWN,
                linear.in_features,
                linear.out_features,
                bytes_of(stored),
                name,
                UNKNOWN,
            )
        )
    return LayersView(tuple(views), False, frozenset(), 0)
