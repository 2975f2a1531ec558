"""What a graph's table of quantized layers holds, read and written without the passes, which a device does not have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx

from exporter.errors import InputError
from plugins.formats import get_format
from plugins.op import PackedLinear, is_ours

LAYERS_KEY = "fp4export.layers"
OUTPUTS_KEY = "fp4export.outputs"
TARGET_KEY = "fp4export.target"

Entry = TypeVar("Entry", bound="LayerEntry | OutputEntry")


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
        from exporter.passes.encodings import decode

        return decode(raw, get_format(self.activation_format), self.encoding)


@dataclass(frozen=True)
class OutputEntry:
    """One quantized output of a graph: the tensor `input` of the layer is rounded to the tensor `output`.

    `layer` is its module path in the model as it was loaded, `group_size` as in recipes (0: a scale per token).
    """

    layer: str
    format: str
    group_size: int
    input: str
    output: str


def write_output_table(model: onnx.ModelProto, table: Sequence[OutputEntry]) -> None:
    """Put the table into the model's metadata, in place of what was there; an empty one leaves nothing."""
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != OUTPUTS_KEY}
    if table:
        kept[OUTPUTS_KEY] = json.dumps([asdict(entry) for entry in table])
    onnx.helper.set_model_props(model, kept)


def read_output_table(model: onnx.ModelProto) -> tuple[OutputEntry, ...]:
    """The quantized outputs in a model's metadata. Raises `InputError` for a damaged table."""
    return _read(model, OUTPUTS_KEY, OutputEntry)


def write_layer_table(model: onnx.ModelProto, table: Sequence[LayerEntry], target: str) -> None:
    """Put the table and the target's name into the model's metadata, in place of what was there."""
    kept = {entry.key: entry.value for entry in model.metadata_props}
    kept[LAYERS_KEY] = json.dumps([asdict(entry) for entry in table])
    kept[TARGET_KEY] = target
    onnx.helper.set_model_props(model, kept)


def read_layer_table(model: onnx.ModelProto) -> tuple[LayerEntry, ...]:
    """The table in a model's metadata; empty for a model that has none. Raises `InputError` for a damaged one."""
    return _read(model, LAYERS_KEY, LayerEntry)


def _read(model: onnx.ModelProto, key: str, kind: type[Entry]) -> tuple[Entry, ...]:
    text = next((entry.value for entry in model.metadata_props if entry.key == key), "[]")
    names = {field.name for field in fields(kind)}
    try:
        rows = json.loads(text)
        if not all(isinstance(row, dict) and set(row) == names for row in rows):
            raise ValueError(f"every row must have the fields {', '.join(sorted(names))}")
        return tuple(kind(**row) for row in rows)
    except (ValueError, TypeError) as error:
        raise InputError(f"the ONNX file's metadata {key} is damaged: {error}; export the model again") from error


def makers_of(model: onnx.ModelProto, table: Sequence[LayerEntry]) -> dict[str, onnx.NodeProto]:
    """The node that makes each tensor, or each layer's `output` that a plugin goes on with and keeps to itself."""
    makers = {name: node for node in model.graph.node for name in node.output}
    plugins = {layer_of(node): node for node in model.graph.node if is_ours(node) and PackedLinear.parse(node.op_type)}
    hidden = {entry.output: plugins[entry.layer] for entry in table if entry.layer in plugins}
    return {**hidden, **makers}


def layer_of(node: onnx.NodeProto) -> str:
    """The layer that an operator of the project serves, "" where it does not say."""
    return next((attribute.s.decode() for attribute in node.attribute if attribute.name == "layer"), "")


def target_of(model: onnx.ModelProto) -> str | None:
    """The name of the target that a model was exported or lowered for; None for a model of other origin."""
    return next((entry.value for entry in model.metadata_props if entry.key == TARGET_KEY), None)
