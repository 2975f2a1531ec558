"""Cut graphs for teacher forcing: tensors become inputs, what they led to is compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

# A tensor that is computed and also given is read under this name by its consumers.
GIVEN_SUFFIX = ".given"


class CutError(ValueError):
    """The graph lacks a tensor that it should be cut at."""


@dataclass(frozen=True)
class GivenTensor:
    """A tensor that becomes a graph input: its element type (onnx.TensorProto) and how many axes it has."""

    name: str
    element_type: int
    rank: int

    @classmethod
    def like(cls, name: str, array: npt.NDArray[np.generic]) -> GivenTensor:
        """Described by an example of its value."""
        return cls(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.ndim)


def given_name(name: str) -> str:
    """The graph input that stands for tensor `name` in a cut graph."""
    return name + GIVEN_SUFFIX


def tensor_names(model: onnx.ModelProto) -> set[str]:
    """Every tensor that the main graph computes or is given."""
    names = {value.name for value in model.graph.input}
    return names.union(name for node in model.graph.node for name in node.output)


def names_read(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that a node reads, its subgraphs included."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from names_read(inner)


def cut(model: onnx.ModelProto, given: Iterable[GivenTensor], wanted: Sequence[str]) -> onnx.ModelProto:
    """A model that computes `wanted` from `given` and from those of its own inputs that are still needed.

    Every consumer of a given tensor T reads the new input "T.given" instead, with all axes dynamic, so T itself may
    be computed and compared in the same run. Functions, opsets and metadata are kept; initializers only as needed.

    Raises:
        CutError: a given or wanted tensor is not in the graph.
    """
    given = list(given)
    known = tensor_names(model)
    missing = [name for name in (*(tensor.name for tensor in given), *wanted) if name not in known]
    if missing:
        raise CutError(f"the graph has no tensor named {missing[0]!r}")
    renamed = {tensor.name: given_name(tensor.name) for tensor in given}
    nodes = _needed_nodes(model.graph.node, renamed, wanted)
    read = {name for node in nodes for name in names_read(node)}
    types = {info.name: info for info in (*model.graph.value_info, *model.graph.output)}
    inputs = [given_input(tensor) for tensor in given if given_name(tensor.name) in read]
    graph = helper.make_graph(
        nodes,
        f"{model.graph.name}.cut",
        inputs + [value for value in model.graph.input if value.name in read],
        [typed_output(types, name) for name in wanted],
    )
    result = helper.make_model(
        graph, functions=model.functions, opset_imports=model.opset_import, ir_version=model.ir_version
    )
    # Not through the graph, which would be copied into the model once more.
    result.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in read)
    result.metadata_props.extend(model.metadata_props)
    return result


def _needed_nodes(
    nodes: Iterable[onnx.NodeProto], renamed: Mapping[str, str], wanted: Iterable[str]
) -> list[onnx.NodeProto]:
    """Copies of the nodes that `wanted` depends on, reading the new names; `nodes` are in topological order."""
    needed, kept = set(wanted), []
    for node in reversed(list(nodes)):
        if needed.isdisjoint(node.output):
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [renamed.get(name, name) for name in node.input]
        needed.update(names_read(copy))
        kept.append(copy)
    return kept[::-1]


def typed_output(types: Mapping[str, onnx.ValueInfoProto], name: str) -> onnx.ValueInfoProto:
    """The output `name`, with the element type that `types` state for it: TensorRT's parser takes no others."""
    element_type = types[name].type.tensor_type.elem_type if name in types else 0
    return helper.make_tensor_value_info(name, element_type, None) if element_type else onnx.ValueInfoProto(name=name)


def given_input(tensor: GivenTensor) -> onnx.ValueInfoProto:
    """The input that stands for a given tensor, with all axes dynamic."""
    name = given_name(tensor.name)
    shape = [f"{name}.{axis}" for axis in range(tensor.rank)]
    return helper.make_tensor_value_info(name, tensor.element_type, shape)
