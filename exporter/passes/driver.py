"""Runs passes over a model and hands back a model that is valid after every one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx
import onnx_graphsurgeon as gs
from onnx import helper
from onnx_graphsurgeon.logger import G_LOGGER

from exporter.errors import InputError
from exporter.passes.inference import infer, skeleton
from exporter.passes.layer_table import (
    LayerEntry,
    layer_table,
    read_layer_table,
    with_encodings,
    write_layer_table,
)
from exporter.targets import Target
from plugins.op import attach_functions

Pass: TypeAlias = Callable[[gs.Graph, Target], int]
Keep: TypeAlias = Callable[[str, int, onnx.ModelProto], None]

OPSETS = (21, 22, 23)
"""Versions of the standard operators that blocked DequantizeLinear, ONNX Runtime and TensorRT's parser share."""


@dataclass(frozen=True)
class PassResult:
    """One pass that ran: its name, how many places it changed, and how many nodes the graph has after it."""

    name: str
    changed: int
    nodes: int


def run_passes(
    model: onnx.ModelProto, passes: Sequence[Pass], target: Target, keep: Keep | None = None
) -> tuple[onnx.ModelProto, list[PassResult]]:
    """Run `passes` in order; `model` itself is not changed.

    The result has the function bodies that its nodes need, fresh shapes, and the table of its layers in its metadata.
    `keep(name, index, model)` gets the graph after every pass, complete in the same way. Raises `InputError` for an
    operator version out of `OPSETS`, and whatever a pass raises.
    """
    _check_opset(model)
    with G_LOGGER.suppress(G_LOGGER.ERROR):
        return _run(model, passes, target, keep)


def _run(
    model: onnx.ModelProto, passes: Sequence[Pass], target: Target, keep: Keep | None
) -> tuple[onnx.ModelProto, list[PassResult]]:
    graph = gs.import_onnx(model)
    graph.functions.clear()
    _constants_to_initializers(graph)
    _annotate(graph, model)
    table = layer_table(graph) or read_layer_table(model)
    results = []
    for index, run in enumerate(passes, start=1):
        changed = run(graph, target)
        graph.cleanup()
        table = layer_table(graph) or table
        results.append(PassResult(run.__name__, changed, len(graph.nodes)))
        if keep is not None:
            keep(run.__name__, index, _export(graph, model, table, target))
    exported = _export(graph, model, table, target)
    onnx.checker.check_model(skeleton(exported), full_check=True)
    return exported, results


def _check_opset(model: onnx.ModelProto) -> None:
    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if version not in OPSETS:
        raise InputError(f"the ONNX graph uses operator version {version}; export it with one of {OPSETS}")


def _constants_to_initializers(graph: gs.Graph) -> None:
    for node in [node for node in graph.nodes if node.op == "Constant" and "value" in node.attrs]:
        tensor = node.outputs[0]
        node.outputs.clear()
        tensor.to_constant(node.attrs["value"].values)
    graph.cleanup()


def _annotate(graph: gs.Graph, model: onnx.ModelProto) -> None:
    """Give the graph's tensors the types and shapes that inference finds."""
    known = {info.name: info.type.tensor_type for info in infer(model)}
    for name, tensor in graph.tensors().items():
        if name in known and isinstance(tensor, gs.Variable):
            kind = known[name]
            tensor.dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            if kind.HasField("shape"):
                tensor.shape = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim]


def _export(graph: gs.Graph, source: onnx.ModelProto, table: Sequence[LayerEntry], target: Target) -> onnx.ModelProto:
    model: onnx.ModelProto = gs.export_onnx(graph)
    model.ir_version = source.ir_version
    attach_functions(model)
    model.metadata_props.extend(source.metadata_props)
    del model.graph.value_info[:]
    model.graph.value_info.extend(infer(model))
    types = {info.name: info.type.tensor_type.elem_type for info in model.graph.value_info}
    write_layer_table(model, with_encodings(table, types), target.name)
    return model
