"""Passes that turn a lowered graph into one that ONNX Runtime runs, where its own types are beyond ONNX Runtime.

The gate compares the result in the lowered graph's place: the same numbers by the definitions of TensorRT's operators,
in float32, rounded where the engine stores them. What a GPU's own kernels round differently it cannot show.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto

from exporter.onnx_files import LARGEST_WORK_FILE_BYTES, nodes_of, read_model, save_onnx
from exporter.passes.driver import Pass, run_passes
from exporter.passes.emulate_blocks import emulate_blocks
from exporter.passes.emulate_compute import round_to_compute_type
from exporter.passes.plugins.open import open_plugins
from exporter.targets import Target

EMULATED = "emulated"
"""First part of the file name of a graph that stands in for a lowered one."""

_EMULATED_TYPES = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT4E2M1})

EMULATION_PASSES: tuple[Pass, ...] = (emulate_blocks, round_to_compute_type)


def emulation_passes(target: Target) -> tuple[Pass, ...]:
    """The passes that stand in for the target's types; none where ONNX Runtime is the target itself."""
    if target.engine == "onnxruntime":
        return ()
    return (open_plugins, *EMULATION_PASSES) if target.kernels == "plugin" else EMULATION_PASSES


def runs_as_it_is(model: onnx.ModelProto) -> bool:
    """Whether no pass can have anything to stand in for: the graph, which may lack its weights' values, has standard
    operators alone, and no tensor of a type that ONNX Runtime's CPU lacks or does not compute in."""
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {tensor.data_type for tensor in graph.initializer} | {value.type.tensor_type.elem_type for value in values}
    return types.isdisjoint(_EMULATED_TYPES) and all(node.domain == "" for node in nodes_of(graph.node))


def runnable_graph(lowered: Path, target: Target, path: Path) -> Path:
    """What stands for a lowered graph in ONNX Runtime: itself, or the same numbers in types that it has, in `path`.

    Raises `InputError` where the graph cannot be read.
    """
    passes = emulation_passes(target)
    # A large graph's weights are not read where nothing is going to be done with them.
    if not passes or runs_as_it_is(read_model(lowered, external_data=False)):
        return lowered
    model, results = run_passes(read_model(lowered), passes, target)
    if not any(result.changed for result in results):
        return lowered
    save_onnx(model, path, LARGEST_WORK_FILE_BYTES)
    return path


def relation_to_engine(compared: Path) -> str:
    """What a graph that is looked at in an engine's place, by its file's name, is to the engine."""
    if compared.name.startswith(f"{EMULATED}."):
        return "which has the engine's numbers in types that ONNX Runtime runs"
    return "which the engine is made of"
