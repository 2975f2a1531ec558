"""Graphs that are built to look into an engine, through block boundaries alone.

A tensor that becomes an output stops the builder from fusing across it. Between blocks that costs little; inside one it
would change what is looked for. So a layer is not looked at: it is put into FP32, and the block's output tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, inliner

from exporter.bisect.look import given_boundaries
from exporter.bisect.suspect import Suspect
from exporter.bisect.trial import in_fp32
from exporter.errors import InputError
from exporter.gate.subgraphs import cut, given_name, tensor_names
from exporter.layer_entries import TARGET_KEY
from plugins.op import is_ours

_AS_FP32 = ".as_fp32"
_IN_FP32 = ".in_fp32"


def with_boundaries(model: onnx.ModelProto, boundaries: Iterable[str]) -> onnx.ModelProto:
    """The whole graph with these tensors as outputs beside its own; those of another type than FP32 through a Cast.

    Raises `InputError` where the graph lacks one, or does not say its type.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    known = tensor_names(model)
    types = {info.name: info.type.tensor_type.elem_type for info in (*graph.value_info, *graph.output)}
    own = {value.name for value in graph.output}
    for name in (name for name in boundaries if name not in own):
        if name not in known or name not in types:
            raise InputError(f"the graph that the engine is made of has no tensor {name!r} of a known type")
        shown = name
        if types[name] != TensorProto.FLOAT:
            shown = f"{name}{_AS_FP32}"
            graph.node.append(helper.make_node("Cast", [name], [shown], shown, to=TensorProto.FLOAT))
        graph.output.append(helper.make_tensor_value_info(shown, TensorProto.FLOAT, None))
    return result


def boundary_of(output: str) -> str:
    """The boundary that an output of such a graph shows."""
    return output.removesuffix(_AS_FP32)


def in_fp32_name(what: str) -> str:
    """The output of `block_variants` that is the block's with this layer, or with all layers of this block, in FP32."""
    return f"{what}{_IN_FP32}"


def block_variants(
    suspect: Suspect, model: onnx.ModelProto, block: str, feed: Mapping[str, npt.NDArray[np.generic]]
) -> onnx.ModelProto:
    """One block of `model`, the graph that the engine is made of, side by side as it is, with each of its linears in
    FP32, and with all of them: outputs "BLOCK.output", "LAYER.in_fp32", "BLOCK.in_fp32".

    It reads the boundaries by their names in a cut graph; all shapes are those of `feed`. Raises `InputError` where
    layers cannot be taken out of the graph, or the work folder has no longer what they were made of.
    """
    if suspect.reference.rounding is not None:
        raise InputError(f"in {suspect.reference.rounding.compute} the graph has no FP32 to put a layer into")
    if any(is_ours(node) for node in model.graph.node):
        raise InputError("its plugins compute more than one layer each")
    wanted = f"{block}.output"
    given = given_boundaries(suspect, model)
    alone = cut(model, given, [wanted])
    for value in alone.graph.input:
        value.CopyFrom(
            helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, feed[value.name].shape)
        )
    read = {tensor.name: given_name(tensor.name) for tensor in given}
    entries = tuple(
        replace(entry, input=read.get(entry.input, entry.input))
        for entry in suspect.layers
        if entry.layer.startswith(f"{block}.")
    )
    part = replace(suspect, model=alone, layers=entries)
    layers = [entry.layer for entry in entries]
    variants = {wanted: alone}
    variants |= {in_fp32_name(layer): cut(in_fp32(part, [layer]), [], [wanted]) for layer in layers}
    variants |= {in_fp32_name(block): cut(in_fp32(part, layers), [], [wanted])}
    return _side_by_side(variants, wanted)


def _side_by_side(variants: Mapping[str, onnx.ModelProto], wanted: str) -> onnx.ModelProto:
    """One graph of several with the same inputs, in which the tensor `wanted` of each has a name of its own."""
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, onnx.TensorProto] = {}
    inputs: dict[str, onnx.ValueInfoProto] = {}
    for output, variant in variants.items():
        graph = inliner.inline_local_functions(variant).graph
        nodes += _renamed(graph.node, output, wanted)
        constants |= {tensor.name: tensor for tensor in graph.initializer}
        inputs |= {value.name: value for value in graph.input}
    first = variants[wanted]
    graph = helper.make_graph(
        nodes,
        f"{first.graph.name}.variants",
        list(inputs.values()),
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in variants],
        list(constants.values()),
    )
    result = helper.make_model(graph, opset_imports=first.opset_import, ir_version=first.ir_version)
    # Not the table of layers: half of them are not in their containers any more.
    result.metadata_props.extend(entry for entry in first.metadata_props if entry.key == TARGET_KEY)
    return result


def _renamed(nodes: Sequence[onnx.NodeProto], output: str, wanted: str) -> list[onnx.NodeProto]:
    names = {name: f"{output}/{name}" for node in nodes for name in node.output if name} | {wanted: output}
    copies = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{output}/{node.name}"
        copy.input[:] = [names.get(name, name) for name in node.input]
        copy.output[:] = [names.get(name, name) for name in node.output]
        copies.append(copy)
    return copies
