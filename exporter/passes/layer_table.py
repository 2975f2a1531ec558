"""The table of quantized layers that every graph and output carries, by which validation finds things again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import onnx_graphsurgeon as gs
from onnx import TensorProto

from exporter.layer_entries import (
    LAYERS_KEY,
    TARGET_KEY,
    Entry,
    LayerEntry,
    OutputEntry,
    read_layer_table,
    read_output_table,
    write_layer_table,
    write_output_table,
)
from exporter.passes.choose import scales_of
from exporter.passes.surgery import online_quantizer, producer, variant_of
from plugins.op import FakeQuantize, Gemm

__all__ = [
    "LAYERS_KEY",
    "TARGET_KEY",
    "LayerEntry",
    "OutputEntry",
    "layer_table",
    "output_table",
    "read_layer_table",
    "read_output_table",
    "updated_table",
    "with_encodings",
    "write_layer_table",
    "write_output_table",
]

_ENCODING_OF_TYPE: Mapping[int, str] = MappingProxyType(
    {
        TensorProto.FLOAT: "float32",
        TensorProto.UINT8: "uint8",
        TensorProto.INT8: "int8",
        TensorProto.FLOAT8E4M3FN: "fp8",
    }
)


def layer_table(graph: gs.Graph) -> tuple[LayerEntry, ...]:
    """The entries of all FloatGemm nodes, in the graph's order."""
    entries = []
    for node in graph.nodes:
        gemm = variant_of(node, Gemm)
        if gemm is None:
            continue
        values = node.inputs[0]
        quantize = producer(values) if gemm.quantizes_activations else None
        online = online_quantizer(quantize) is not None
        entries.append(
            LayerEntry(
                layer=node.attrs["layer"],
                weight_format=gemm.weight_format,
                activation_format=gemm.activation_format,
                group_size=gemm.group_size,
                scales=scales_of(gemm),
                container=node.attrs["container"],
                in_features=gemm.count,
                out_features=int(node.inputs[gemm.input_names.index("weight_scales")].shape[0]),
                input=quantize.inputs[0].name if quantize is not None and online else values.name,
                values=values.name if gemm.quantizes_activations else "",
                token_scales=node.inputs[1].name if gemm.quantizes_activations else "",
                output=node.outputs[0].name,
                encoding="float32",
            )
        )
    return tuple(entries)


def output_table(graph: gs.Graph) -> tuple[OutputEntry, ...]:
    """The entries of all FloatFakeQuantize nodes, in the graph's order."""
    found = ((node, variant_of(node, FakeQuantize)) for node in graph.nodes)
    return tuple(
        OutputEntry(node.attrs["layer"], variant.format, variant.group_size, node.inputs[0].name, node.outputs[0].name)
        for node, variant in found
        if variant is not None
    )


def updated_table(table: Sequence[Entry], found: Sequence[Entry]) -> tuple[Entry, ...]:
    """The table with what a graph says now of layers that it still has as nodes of ours; others were lowered."""
    now = {entry.layer: entry for entry in found}
    known = {entry.layer for entry in table}
    return (
        *(now.get(entry.layer, entry) for entry in table),
        *(entry for entry in found if entry.layer not in known),
    )


def with_encodings(table: Sequence[LayerEntry], element_types: Mapping[str, int]) -> tuple[LayerEntry, ...]:
    """The entries with the encoding that their `values` tensor's ONNX element type says.

    For FP16 products on GPUs without FP8, E4M3 numbers lie in INT8 tensors as their bytes.
    """
    encodings = {
        name: _ENCODING_OF_TYPE.get(element_types.get(name, TensorProto.FLOAT), "float32")
        for name in {entry.values for entry in table}
    }
    return tuple(
        replace(
            entry,
            encoding="fp8_bytes"
            if entry.container == "fp16" and encodings[entry.values] == "int8"
            else encodings[entry.values],
        )
        for entry in table
    )
