"""The table of quantized layers that every graph and output carries, by which validation finds things again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from exporter.errors import InputError
from exporter.passes.choose import scales_of
from exporter.passes.encodings import decode
from exporter.passes.surgery import online_quantizer, producer, variant_of
from plugins.formats import get_format
from plugins.op import Gemm

LAYERS_KEY = "fp4export.layers"
TARGET_KEY = "fp4export.target"

_ENCODING_OF_TYPE: Mapping[int, str] = MappingProxyType(
    {
        TensorProto.FLOAT: "float32",
        TensorProto.UINT8: "uint8",
        TensorProto.INT8: "int8",
        TensorProto.FLOAT8E4M3FN: "fp8",
    }
)


@dataclass(frozen=True)
class LayerEntry:
    """One quantized linear layer of a graph, weight [out_features, in_features].

    `input`, `values`, `token_scales` and `output` are names of tensors in the graph that holds the table: what the
    layer reads, its quantized activations and their scales ("" for a weight-only layer), and its result with the
    bias. `encoding` says how `values` stands for values of `activation_format`. `scales` is what recipes call them,
    and `container` is "" where none has been chosen yet.
    """

    layer: str
    weight_format: str
    activation_format: str
    group_size: int
    scales: str
    container: str
    in_features: int
    out_features: int
    input: str
    values: str
    token_scales: str
    output: str
    encoding: str

    def decode_values(self, raw: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The grid values, float32, that the tensor `values` holds."""
        return decode(raw, get_format(self.activation_format), self.encoding)


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


def with_encodings(table: Sequence[LayerEntry], element_types: Mapping[str, int]) -> tuple[LayerEntry, ...]:
    """The entries with the encoding that their `values` tensor's ONNX element type says."""
    return tuple(
        replace(entry, encoding=_ENCODING_OF_TYPE.get(element_types.get(entry.values, TensorProto.FLOAT), "float32"))
        for entry in table
    )


def write_layer_table(model: onnx.ModelProto, table: Sequence[LayerEntry], target: str) -> None:
    """Put the table and the target's name into the model's metadata, in place of what was there."""
    kept = {entry.key: entry.value for entry in model.metadata_props}
    kept[LAYERS_KEY] = json.dumps([asdict(entry) for entry in table])
    kept[TARGET_KEY] = target
    onnx.helper.set_model_props(model, kept)


def read_layer_table(model: onnx.ModelProto) -> tuple[LayerEntry, ...]:
    """The table in a model's metadata; empty for a model that has none. Raises `InputError` for a damaged one."""
    text = next((entry.value for entry in model.metadata_props if entry.key == LAYERS_KEY), "[]")
    names = {field.name for field in fields(LayerEntry)}
    try:
        rows = json.loads(text)
        if not all(isinstance(row, dict) and set(row) == names for row in rows):
            raise ValueError(f"every row must have the fields {', '.join(sorted(names))}")
        return tuple(LayerEntry(**row) for row in rows)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"the ONNX file's metadata {LAYERS_KEY} is damaged: {error}; export the model again"
        ) from error
