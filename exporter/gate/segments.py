"""A large graph in the memory of one block: cut between its blocks, its constants computed segment by segment.

ONNX Runtime computes a graph's constants (unpacked, decoded, scaled weights) when it loads the graph, and keeps
everything on the way until all are done: up to 14 times a model's FP32 weights. A segment is a small graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import helper, inliner, numpy_helper

from exporter.gate.records import OUTPUT, SHARED_PREFIX
from exporter.gate.subgraphs import GivenTensor, cut, given_name, names_read, tensor_names
from exporter.passes.layer_table import LayerEntry
from exporter.runtime import OnnxSession

LARGEST_WHOLE = 16_000_000
"""Quantized weights of a graph that is run in one piece."""

# Decoded when the graph runs: computed ahead, a container's weights would be FP32 in memory.
_DECODERS = frozenset({"DequantizeLinear"})


def is_large(layers: Iterable[LayerEntry]) -> bool:
    """Whether a graph with these quantized layers is run in segments."""
    return sum(entry.in_features * entry.out_features for entry in layers) > LARGEST_WHOLE


def segment_outputs(model: onnx.ModelProto, blocks: Sequence[str]) -> list[tuple[str, ...]]:
    """What each segment computes: all that enters the blocks, then each block's output, then the model's own."""
    computed = tensor_names(model) - {value.name for value in model.graph.input}
    entering = sorted(name for name in computed if name.startswith(SHARED_PREFIX) or name == f"{blocks[0]}.input")
    segments = [tuple(entering), *((f"{block}.output",) for block in blocks), (OUTPUT,)]
    return [names for names in segments if names]


def segment(
    model: onnx.ModelProto, given: Mapping[str, npt.NDArray[np.generic]], wanted: Sequence[str], *, decode: bool
) -> onnx.ModelProto:
    """The part of `model` that computes `wanted` from its inputs and the `given` tensors (see `cut`), with everything
    that depends on constants alone computed; without `decode`, weights in containers stay in them.
    """
    part = cut(model, [GivenTensor.like(name, np.asarray(array)) for name, array in given.items()], wanted)
    return with_constants_computed(part, keep=frozenset() if decode else _DECODERS)


def with_constants_computed(model: onnx.ModelProto, keep: frozenset[str] = frozenset()) -> onnx.ModelProto:
    """The model with initializers in place of nodes that read nothing but constants, functions inlined.

    ONNX Runtime computes them, each node as it stands. Operators in `keep`, and what reads them, stay.
    """
    if model.functions:
        model = inliner.inline_local_functions(model)
    known = {tensor.name for tensor in model.graph.initializer}
    constant, rest = [], []
    for node in model.graph.node:
        nested = any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute)
        if not nested and node.op_type not in keep and all(name in known for name in node.input if name):
            constant.append(node)
            known.update(node.output)
        else:
            rest.append(node)
    read = {name for node in rest for name in names_read(node)} | {value.name for value in model.graph.output}
    wanted = [name for node in constant for name in node.output if name in read]
    stored = [tensor for tensor in model.graph.initializer if tensor.name in read]
    graph = helper.make_graph(
        rest,
        model.graph.name,
        list(model.graph.input),
        list(model.graph.output),
        [*stored, *_computed(model, constant, wanted)],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _computed(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], wanted: Sequence[str]) -> list[onnx.TensorProto]:
    if not wanted:
        return []
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "constants",
        [],
        [onnx.ValueInfoProto(name=name) for name in wanted],
        [tensor for tensor in model.graph.initializer if tensor.name in read],
    )
    constants = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(constants.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [numpy_helper.from_array(array, name) for name, array in zip(wanted, session.run(wanted, {}), strict=True)]


@dataclass
class SegmentedSession:
    """A large graph ready to run like an `OnnxSession`, loaded segment by segment when it first runs.

    Weights stay in their containers, so it takes the memory that the graph takes in its own runtime.
    """

    model: onnx.ModelProto
    blocks: Sequence[str]
    _sessions: list[OnnxSession] = field(default_factory=list)

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """The model's output by name. Raises `InputError` as `OnnxSession.run` does."""
        state: dict[str, npt.NDArray[Any]] = {}
        for index, names in enumerate(segment_outputs(self.model, self.blocks)):
            if index == len(self._sessions):
                graph = segment(self.model, state, names, decode=False)
                self._sessions.append(OnnxSession(graph, fold_constants=False))
            session = self._sessions[index]
            available = {**feeds, **{given_name(name): array for name, array in state.items()}}
            state |= session.run({spec.name: available[spec.name] for spec in session.inputs})
        return {OUTPUT: state[OUTPUT]}
