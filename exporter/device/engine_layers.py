"""Whether an engine does what its graph says: quantized layers in 8 or 4 bits, or in our plugin, none silently in FP32.

Read from TensorRT's engine inspector: a layer names the ONNX nodes that it was made of in `Metadata`, as
``[ONNX Layer: NAME]``, and the element types of its inputs in `Format/Datatype`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import onnx

from exporter.device.graph import LoweredGraph
from exporter.errors import InputError
from exporter.layer_entries import makers_of
from plugins.op import is_ours

_PRODUCTS = frozenset({"MatMul", "Gemm"})
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PLUGIN = re.compile("plugin", re.IGNORECASE)
_TYPES: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "int8": re.compile(r"int8(?!\d)", re.IGNORECASE),
        "int4": re.compile(r"int4(?!\d)", re.IGNORECASE),
        "fp8": re.compile(r"fp8|e4m3", re.IGNORECASE),
        "mxfp8": re.compile(r"fp8|e4m3", re.IGNORECASE),
        "fp4": re.compile(r"fp4|e2m1", re.IGNORECASE),
        # A layer that was asked to multiply in floats may read anything.
        "fp16": re.compile(""),
        "fp32": re.compile(""),
    }
)

State = Literal["as planned", "wrong", "not visible"]


@dataclass(frozen=True)
class LayerVerdict:
    """One quantized layer in the engine: `found` is what the inspector says of the product's inputs."""

    layer: str
    expected: str
    found: str
    state: State


def check_layers(graph: LoweredGraph, inspected: str) -> tuple[LayerVerdict, ...]:
    """One verdict per quantized layer, from the inspector's JSON.

    "as planned": among the engine's layers that contain the layer's matrix product one reads numbers of the layer's
    container, or is our plugin. "wrong": none of them does. "not visible": the inspector names none. Raises
    `InputError` for what is no such JSON.
    """
    layers = _layers(inspected)
    by_node: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        for name in _nodes_of(layer):
            by_node.setdefault(name, []).append(layer)
    makers = makers_of(graph.model, graph.layers)
    verdicts = []
    for entry in graph.layers:
        node = _product(entry.output, makers)
        found = by_node.get(node.name, []) if node is not None else []
        plugin = node is not None and is_ours(node)
        expected = f"plugin {node.op_type}" if node is not None and plugin else entry.container
        types = ", ".join(sorted({text for layer in found for text in _input_types(layer)}))
        if not found:
            state: State = "not visible"
        elif plugin:
            state = "as planned" if any(_is_plugin(layer) for layer in found) else "wrong"
        else:
            state = "as planned" if _TYPES[entry.container].search(types) else "wrong"
        verdicts.append(LayerVerdict(entry.layer, expected, types, state))
    return tuple(verdicts)


def _layers(inspected: str) -> list[Mapping[str, Any]]:
    try:
        document = json.loads(inspected)
        layers = document["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"TensorRT's engine inspector gave no list of layers: {error!r}") from error
    # Engines that were built with less than detailed profiling list names alone.
    return [layer for layer in layers if isinstance(layer, dict)]


def _nodes_of(layer: Mapping[str, Any]) -> Iterator[str]:
    yield from dict.fromkeys(_ONNX_NODE.findall(str(layer.get("Metadata", ""))))


def _input_types(layer: Mapping[str, Any]) -> list[str]:
    """Element types of what the layer reads: its inputs, and weights that are part of it."""
    inputs = [str(entry.get("Format/Datatype", "")) for entry in layer.get("Inputs", ()) if isinstance(entry, dict)]
    weights = layer.get("Weights")
    return [text for text in (*inputs, str(weights.get("Type", "")) if isinstance(weights, dict) else "") if text]


def _is_plugin(layer: Mapping[str, Any]) -> bool:
    return any(_PLUGIN.search(str(layer.get(key, ""))) for key in ("LayerType", "PluginType", "ParameterType"))


def _product(output: str, makers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The matrix product or plugin behind a layer's result, nearest first: its epilogue reads it before the scales."""
    waiting, seen = [output], set()
    while waiting:
        name = waiting.pop(0)
        node = makers.get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if node.op_type in _PRODUCTS or is_ours(node):
            return node
        waiting.extend(node.input)
    return None
