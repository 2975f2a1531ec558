"""A large graph in the memory of one block: cut between its blocks, its constants computed segment by segment.

ONNX Runtime computes a graph's constants (unpacked, decoded, scaled weights) when it loads the graph, and keeps
everything on the way until all are done: up to 14 times a model's FP32 weights. A segment is a small graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import helper, inliner

from exporter.errors import FidelityError
from exporter.gate.records import OUTPUT, SHARED_PREFIX
from exporter.gate.runs import Part, refusals
from exporter.gate.subgraphs import (
    CutError,
    GivenTensor,
    given_input,
    given_name,
    names_read,
    tensor_names,
    typed_output,
)
from exporter.onnx_files import with_values
from exporter.runtime import OnnxSession
from exporter.runtime.arena import share_arena

LARGEST_WHOLE = 16_000_000
"""Quantized weights of a graph that is run in one piece."""

# Decoded when the graph runs: computed ahead, a container's weights would be FP32 in memory.
_DECODERS = frozenset({"DequantizeLinear"})

Constants: TypeAlias = Mapping[str, npt.NDArray[Any]]
"""Computed constants by name."""


class LinearShape(Protocol):
    """A quantized layer of a graph or of a model."""

    @property
    def in_features(self) -> int:
        """K of its weight [N, K]."""

    @property
    def out_features(self) -> int:
        """N."""


def is_large(layers: Iterable[LinearShape]) -> bool:
    """Whether a graph with these quantized layers is run in segments."""
    return sum(layer.in_features * layer.out_features for layer in layers) > LARGEST_WHOLE


def segment_outputs(model: onnx.ModelProto, blocks: Sequence[str]) -> list[tuple[str, ...]]:
    """What each segment computes: all that enters the blocks, then each block's output, then the model's own."""
    computed = tensor_names(model) - {value.name for value in model.graph.input}
    entering = sorted(name for name in computed if _is_shared(name) or name == f"{blocks[0]}.input")
    segments = [tuple(entering), *((f"{block}.output",) for block in blocks), (OUTPUT,)]
    return [names for names in segments if names]


def _is_shared(name: str) -> bool:
    """Whether a tensor is what all blocks read: "blocks.temb", but no tensor inside a block called "blocks.0"."""
    return name.startswith(SHARED_PREFIX) and name.removeprefix(SHARED_PREFIX).isidentifier()


class DividedGraph:
    """A large graph to take parts from.

    What depends on constants alone is computed by ONNX Runtime, each node as it stands, and handed to the parts that
    read it: a block, its linears each on their own and the block with tiles read the same tensors of the same nodes, so
    that their weights are decoded once.
    """

    def __init__(
        self, model: onnx.ModelProto, *, decode: bool = True, threads: int | None = None, folder: Path | None = None
    ) -> None:
        """Without `decode`, weights in containers stay in them; `threads` is for the parts' operators. Weights that the
        model lacks are in files in `folder`, and read when they are needed."""
        keep = frozenset() if decode else _DECODERS
        self._model, self._threads, self._folder = model, threads, folder
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._nodes = _inlined_nodes(model)
        self._writer = {name: index for index, node in enumerate(self._nodes) for name in node.output if name}
        self._inputs = {value.name: value for value in model.graph.input}
        self._types = {info.name: info for info in (*model.graph.value_info, *model.graph.output)}
        self._constant = _constant_nodes(self._nodes, self._stored, keep)

    def part(
        self, given: Mapping[str, npt.NDArray[np.generic]], wanted: Sequence[str], known: Constants | None = None
    ) -> Part:
        """What computes `wanted` from the graph's inputs and the `given` tensors, named as `cut` names them.

        Constants that are not `known` are computed.

        Raises:
            CutError: the graph lacks a tensor.
            FidelityError: ONNX Runtime cannot compute a constant.
            InputError: a weight's values cannot be read from their file.
        """
        for name in (*given, *wanted):
            if name not in self._writer and name not in self._inputs:
                raise CutError(f"the graph has no tensor named {name!r}")
        indices = self._needed(given, wanted)
        renamed = {name: given_name(name) for name in given}
        nodes = [_reading(self._nodes[index], renamed) for index in sorted(indices)]
        read = {name for node in nodes for name in names_read(node)}
        constants = self._computed(self._computable([*read, *wanted]), known or {})
        inputs = [
            given_input(GivenTensor.like(name, np.asarray(given[name]))) for name in given if renamed[name] in read
        ]
        graph = helper.make_graph(
            nodes,
            "part",
            [*inputs, *(value for name, value in self._inputs.items() if name in read)],
            [typed_output(self._types, name) for name in wanted],
        )
        model = helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        model.graph.initializer.extend(self._stored_values(read))
        return Part(model, constants, self._threads)

    def computes(self, given: Collection[str], wanted: Sequence[str], names: Iterable[str]) -> frozenset[str]:
        """Which of the tensors `names` are computed on the way from `given` to `wanted`."""
        indices = self._needed(given, wanted)
        return frozenset(name for name in names if self._writer.get(name) in indices)

    def constants(self, given: Collection[str], wanted: Sequence[str]) -> Constants:
        """The computed constants that are read on the way from `given` to `wanted`. Raises `FidelityError`
        and `InputError` as `part` does."""
        read = [name for index in self._needed(given, wanted) for name in names_read(self._nodes[index])]
        return self._computed(self._computable([*read, *wanted]), {})

    def _needed(self, given: Collection[str], wanted: Sequence[str]) -> set[int]:
        """The nodes, by index, that compute `wanted` from `given` and from constants."""
        needed: set[int] = set()
        open_names = list(wanted)
        while open_names:
            index = self._writer.get(open_names.pop())
            if index is None or index in needed or index in self._constant:
                continue
            needed.add(index)
            open_names += [name for name in names_read(self._nodes[index]) if name not in given]
        return needed

    def _computable(self, names: Iterable[str]) -> frozenset[str]:
        return frozenset(name for name in names if self._writer.get(name) in self._constant)

    def _computed(self, names: frozenset[str], known: Constants) -> Constants:
        missing = sorted(names - known.keys())
        new = dict(zip(missing, self._compute(missing), strict=True)) if missing else {}
        return {name: new[name] if name in new else known[name] for name in names}

    def _stored_values(self, names: Collection[str]) -> Iterator[onnx.TensorProto]:
        return (with_values(tensor, self._folder) for name, tensor in self._stored.items() if name in names)

    def _compute(self, names: Sequence[str]) -> list[npt.NDArray[Any]]:
        indices: set[int] = set()
        open_names = list(names)
        while open_names:
            index = self._writer.get(open_names.pop())
            if index is not None and index not in indices:
                indices.add(index)
                open_names += self._nodes[index].input
        nodes = [self._nodes[index] for index in sorted(indices)]
        read = {name for node in nodes for name in node.input}
        graph = helper.make_graph(nodes, "constants", [], [onnx.ValueInfoProto(name=name) for name in names])
        model = helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        model.graph.initializer.extend(self._stored_values(read))
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # The other cores run the segment before.
        options.intra_op_num_threads = 1
        share_arena(options)
        try:
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            return list(session.run(names, {}))
        except refusals() as error:
            reason = str(error).strip().splitlines()[0]
            raise FidelityError(
                f"ONNX Runtime cannot compute the graph's constants ({names[0]}, …): {reason}"
            ) from error


def _inlined_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes with functions inlined; the initializers stand by as inputs, so that they are not copied."""
    if not model.functions:
        return list(model.graph.node)
    graph = onnx.GraphProto(name=model.graph.name, node=model.graph.node, output=model.graph.output)
    graph.input.extend(model.graph.input)
    graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for tensor in model.graph.initializer
    )
    light = onnx.ModelProto(
        graph=graph, functions=model.functions, opset_import=model.opset_import, ir_version=model.ir_version
    )
    return list(inliner.inline_local_functions(light).graph.node)


def _constant_nodes(nodes: Sequence[onnx.NodeProto], stored: Iterable[str], keep: frozenset[str]) -> frozenset[int]:
    """The nodes, by index, that read nothing but constants; operators in `keep`, and what reads them, are none."""
    known = set(stored)
    constant = set()
    for index, node in enumerate(nodes):
        nested = any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute)
        if not nested and node.op_type not in keep and all(name in known for name in node.input if name):
            constant.add(index)
            known.update(node.output)
    return frozenset(constant)


def _reading(node: onnx.NodeProto, renamed: Mapping[str, str]) -> onnx.NodeProto:
    """The node, reading the new names."""
    if not any(name in renamed for name in node.input):
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [renamed.get(name, name) for name in node.input]
    return copy


def with_constants(
    graph: DividedGraph, segments: Sequence[tuple[str, ...]]
) -> Iterator[tuple[tuple[str, ...], Constants]]:
    """The segments in order, each with its constants; those of the next are computed while one is being used."""
    given = [frozenset(name for names in segments[:index] for name in names) for index in range(len(segments))]
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(graph.constants, given[0], segments[0])
        for index, names in enumerate(segments):
            constants = ahead.result()
            if index + 1 < len(segments):
                ahead = pool.submit(graph.constants, given[index + 1], segments[index + 1])
            yield names, constants


class SegmentedSession:
    """A large graph ready to run like an `OnnxSession`, loaded segment by segment when it first runs.

    Weights stay in their containers, so it takes the memory that the graph takes in its own runtime.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        blocks: Sequence[str],
        folder: Path | None = None,
        probes: Mapping[str, str] | None = None,
    ) -> None:
        """`blocks` are the paths of the model's blocks, in order; weights that it lacks are in files in `folder`.

        `probes` are tensors to give beside the model's output, each with the one that it is made from, whose segment
        computes it.
        """
        self._graph: DividedGraph | None = DividedGraph(model, decode=False, folder=folder)
        self._segments = segment_outputs(model, blocks)
        self._probes = dict(probes or {})
        self._sessions: list[OnnxSession] = []

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """The model's output and the probes by name. Raises `InputError` as `OnnxSession.run` does, and the errors of a
        part."""
        state: dict[str, npt.NDArray[Any]] = {}
        for session in self._sessions if self._graph is None else self._loaded(self._graph, state):
            available = {**feeds, **{given_name(name): array for name, array in state.items()}}
            state |= session.run({spec.name: available[spec.name] for spec in session.inputs})
        return {name: state[name] for name in (OUTPUT, *self._probes)}

    def _loaded(self, graph: DividedGraph, state: Mapping[str, npt.NDArray[Any]]) -> Iterator[OnnxSession]:
        """The sessions one after the other, in whose place `graph` is let go; `state` has what those before gave."""
        sessions = []
        probes = dict(self._probes)
        for names, constants in with_constants(graph, self._segments):
            here = graph.computes(state, names, probes.values())
            # What no segment computes is an input, or made of constants.
            inside = [probe for probe, tensor in probes.items() if tensor in here or names == (OUTPUT,)]
            for probe in inside:
                del probes[probe]
            part = graph.part(state, [*names, *inside], constants)
            sessions.append(OnnxSession(part.complete(), fold_constants=False, shares_arena=True))
            yield sessions[-1]
        self._sessions, self._graph = sessions, None
