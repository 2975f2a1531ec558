"""A graph with some of its quantized linears computed in FP32: does the deviation go away?

The layer keeps its quantized numbers, activations by the waist's own quantizer and weights as calibrated, so that
nothing but the suspect's own arithmetic changes; the reference stays the one it is compared with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from safetensors import SafetensorError, safe_open

from exporter.bisect.suspect import Suspect
from exporter.errors import InputError
from exporter.gate.linears import LINEAR_DB
from exporter.gate.records import LinearRecord
from exporter.gate.snr import snr_db
from exporter.onnx_files import read_model
from exporter.passes.layer_table import LayerEntry, read_layer_table
from exporter.workdir import QUANTIZED
from plugins.block_scales import BLOCK_SCALINGS
from plugins.formats import get_format
from plugins.op import DequantizeValues, attach_functions
from plugins.packing import PackingError, unpack

Floats = npt.NDArray[np.float32]

_SUFFIX = ".in_fp32"


@dataclass(frozen=True)
class Effect:
    """How one comparison changed: its name, SNR in dB with the layers as they were and in FP32, and what is asked."""

    name: str
    before_db: float
    after_db: float
    needed_db: float


@dataclass(frozen=True)
class Trial:
    """The layers that were computed in FP32, what that did, and whether every block and the output are right then."""

    layers: tuple[str, ...]
    effects: tuple[Effect, ...]
    goes_away: bool

    @property
    def rules(self) -> tuple[str, ...]:
        """What to paste under `layers:` in the recipe, before its other rules."""
        return tuple(f'- {{match: "{layer}", weight: none}}' for layer in self.layers)


def in_fp32(suspect: Suspect, layers: Iterable[str]) -> onnx.ModelProto:
    """The suspect's graph with these layers in FP32.

    Raises `InputError` where the work folder has no longer what the layers were made of.
    """
    chosen = set(layers)
    entries = [entry for entry in suspect.layers if entry.layer in chosen]
    records = {record.layer: record for record in suspect.reference.linears}
    quantizers = _quantizers(suspect, chosen)
    model = onnx.ModelProto()
    model.CopyFrom(suspect.model)
    for entry in entries:
        weight = _weight(suspect, entry, records[entry.layer])
        nodes, constants = _linear(entry, quantizers.get(entry.layer), weight, records[entry.layer].bias)
        _put_in_place(model.graph, entry.output, nodes)
        model.graph.initializer.extend(constants)
    attach_functions(model)
    return model


@dataclass(frozen=True)
class _Quantizer:
    """The exported graph's node that quantizes a layer's input, with the constants that it reads."""

    node: onnx.NodeProto
    constants: tuple[onnx.TensorProto, ...]


def _quantizers(suspect: Suspect, layers: set[str]) -> Mapping[str, _Quantizer]:
    if not suspect.exported.is_file():
        raise InputError(f"{suspect.exported}: is gone, so no layer can be tried in FP32; export again")
    exported = read_model(suspect.exported)
    makers = {name: node for node in exported.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in exported.graph.initializer}
    found = {}
    for entry in read_layer_table(exported):
        if entry.layer in layers and entry.values:
            node = makers[entry.values]
            read = tuple(constants[name] for name in node.input if name in constants)
            found[entry.layer] = _Quantizer(node, read)
    return found


def _weight(suspect: Suspect, entry: LayerEntry, record: LinearRecord) -> Floats:
    """The calibrated weight [N, K]. Raises `InputError` unless the work folder has the one that the reference was made
    with."""
    x = record.x
    if record.values is not None and record.scales is not None:
        x = record.values * np.repeat(record.scales, x.shape[1] // record.scales.shape[1], axis=1)
    for path in sorted(suspect.work.glob(f"{QUANTIZED}.*.safetensors")):
        weight = _read_weight(path, entry)
        if weight is not None and snr_db(record.y, x @ weight.T + record.bias) >= LINEAR_DB:
            return weight
    raise InputError(f"{suspect.work}: has no weights of {entry.layer} as the reference was made with; export again")


def _read_weight(path: Path, entry: LayerEntry) -> Floats | None:
    """The layer's weight in a file of calibrated weights; None where it holds none of the layer's shape and format."""
    try:
        with safe_open(path, framework="numpy") as file:
            words, scales = (file.get_tensor(f"{entry.layer}.{part}") for part in ("words", "scales"))
        fmt = get_format(entry.weight_format)
        values = fmt.values[unpack(words, fmt.bits, entry.in_features)]
    except (OSError, SafetensorError, PackingError):
        return None
    if len(values) != entry.out_features:
        return None
    weight: Floats = (values * np.repeat(scales, values.shape[1] // scales.shape[1], axis=1)).astype(np.float32)
    return weight


def _linear(
    entry: LayerEntry, quantizer: _Quantizer | None, weight: Floats, bias: Floats
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Quantize and dequantize the input, multiply, add: nodes that make `entry.output`, and their constants."""

    def name(part: str) -> str:
        return f"{entry.layer}{_SUFFIX}.{part}"

    nodes, constants, x = [], [], entry.input
    if quantizer is not None:
        node = onnx.NodeProto()
        node.CopyFrom(quantizer.node)
        node.name = name("quantize")
        renamed = {tensor.name: name(f"constant.{index}") for index, tensor in enumerate(quantizer.constants)}
        node.input[:] = [entry.input, *(renamed[one] for one in node.input[1:])]
        node.output[:] = [name("values"), name("scales")]
        for tensor in quantizer.constants:
            copy = onnx.TensorProto()
            copy.CopyFrom(tensor)
            copy.name = renamed[tensor.name]
            constants.append(copy)
        scaling = BLOCK_SCALINGS.get(entry.scales)
        variant = DequantizeValues(0 if scaling is None else scaling.group_size)
        nodes += [node, _dequantize(variant, entry.layer, node, name("x"))]
        x = name("x")
    constants += [numpy_helper.from_array(np.ascontiguousarray(weight.T), name("weight"))]
    constants += [numpy_helper.from_array(bias.astype(np.float32), name("bias"))]
    nodes.append(helper.make_node("MatMul", [x, name("weight")], [name("product")], name("product")))
    nodes.append(helper.make_node("Add", [name("product"), name("bias")], [entry.output], name("add")))
    return nodes, constants


def _dequantize(variant: DequantizeValues, layer: str, quantize: onnx.NodeProto, output: str) -> onnx.NodeProto:
    node = helper.make_node(variant.op_type, list(quantize.output), [output], output, domain=quantize.domain)
    node.attribute.extend(helper.make_attribute(key, value) for key, value in variant.attributes(layer).items())
    return node


def _put_in_place(graph: onnx.GraphProto, output: str, nodes: list[onnx.NodeProto]) -> None:
    """Let `nodes` make `output` where the node stands that made it so far, whose result nothing reads any more."""
    position = next(index for index, node in enumerate(graph.node) if output in node.output)
    old = graph.node[position]
    old.output[:] = [f"{name}{_SUFFIX}.unused" if name == output else name for name in old.output]
    kept = [*graph.node[:position], *nodes, *graph.node[position:]]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(copies)
