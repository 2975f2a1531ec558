"""Runs passes over a model and hands back a model that is valid after every one of them."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx
import onnx_graphsurgeon as gs
from onnx import helper
from onnx_graphsurgeon.logger import G_LOGGER

from exporter.errors import InputError
from exporter.passes.history import IMPORTED, PassResult, read_pass_history, write_pass_history
from exporter.passes.inference import infer, skeleton
from exporter.passes.layer_table import (
    LayerEntry,
    OutputEntry,
    layer_table,
    output_table,
    read_layer_table,
    read_output_table,
    updated_table,
    with_encodings,
    write_layer_table,
    write_output_table,
)
from exporter.passes.order import check_order
from exporter.passes.surgery import CONTRIB_DOMAIN
from exporter.passes.tiling import untiled
from exporter.targets import Target
from plugins.op import attach_functions, is_ours

Pass: TypeAlias = Callable[[gs.Graph, Target], int]
Keep: TypeAlias = Callable[[str, int, onnx.ModelProto], None]

# Numbers in a graph from which on the collector, which takes a quarter of a second, is run.
_COLLECTED = 50_000_000

OPSETS = (21, 22, 23)
"""Versions of the standard operators that blocked DequantizeLinear, ONNX Runtime and TensorRT's parser share."""


@dataclass(frozen=True)
class _Tables:
    """The quantized layers and the quantized outputs of a graph."""

    layers: tuple[LayerEntry, ...]
    outputs: tuple[OutputEntry, ...]

    def updated(self, graph: gs.Graph) -> _Tables:
        """With what the graph says now."""
        return _Tables(updated_table(self.layers, layer_table(graph)), updated_table(self.outputs, output_table(graph)))


def run_passes(
    model: onnx.ModelProto, passes: Sequence[Pass], target: Target, keep: Keep | None = None
) -> tuple[onnx.ModelProto, list[PassResult]]:
    """Run `passes` in order; `model` itself is not changed.

    The result has the function bodies that its nodes need, fresh shapes, and in its metadata the table of its layers
    and the history of its passes, to which a run that changed something is added. `keep(name, index, model)` gets the
    graph after every pass, complete in the same way. Raises `InputError` for an operator version out of `OPSETS`,
    `PassOrderError` for a pass whose needs (`exporter.passes.order`) have not run, on this graph or to make it, and
    whatever a pass raises.
    """
    _check_opset(model)
    with G_LOGGER.suppress(G_LOGGER.ERROR):
        changed, results = _run(model, passes, target, keep)
    if sum(math.prod(tensor.dims) for tensor in changed.graph.initializer) > _COLLECTED:
        # Nodes and tensors of graphsurgeon refer to each other, so their weights would wait for the collector.
        gc.collect()
    return changed, results


def _run(
    model: onnx.ModelProto, passes: Sequence[Pass], target: Target, keep: Keep | None
) -> tuple[onnx.ModelProto, list[PassResult]]:
    graph = _annotated_graph(model)
    tables = _Tables(layer_table(graph) or read_layer_table(model), output_table(graph) or read_output_table(model))
    before = read_pass_history(model) or (PassResult(IMPORTED, 0, len(graph.nodes)),)
    results: list[PassResult] = []
    done = [result.name for result in before]
    for index, run in enumerate(passes, start=1):
        if any(is_ours(node) for node in graph.nodes):
            check_order(run.__name__, done)
        done.append(run.__name__)
        changed = run(graph, target)
        graph.cleanup()
        tables = tables.updated(graph)
        results.append(PassResult(run.__name__, changed, len(graph.nodes)))
        if keep is not None:
            keep(run.__name__, index, _export(graph, model, tables, target, (*before, *results)))
    # A run that changed nothing leaves no trace, so that passes on their own result give the same model.
    history = (*before, *results) if any(result.changed for result in results) else before
    exported = _export(graph, model, tables, target, history)
    onnx.checker.check_model(skeleton(exported), full_check=True)
    return exported, results


def import_graph(model: onnx.ModelProto) -> gs.Graph:
    """The graph as the passes see it: constants are initializers, dead nodes are gone, types and shapes are known."""
    with G_LOGGER.suppress(G_LOGGER.ERROR):
        return _annotated_graph(model)


def _annotated_graph(model: onnx.ModelProto) -> gs.Graph:
    graph = gs.import_onnx(model)
    graph.functions.clear()
    _constants_to_initializers(graph)
    _annotate(graph, model)
    return graph


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
        # Sequences and the like have no element type.
        if name in known and isinstance(tensor, gs.Variable) and known[name].elem_type:
            kind = known[name]
            tensor.dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            if kind.HasField("shape"):
                tensor.shape = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim]


def _export(
    graph: gs.Graph,
    source: onnx.ModelProto,
    tables: _Tables,
    target: Target,
    history: Sequence[PassResult],
) -> onnx.ModelProto:
    model: onnx.ModelProto = gs.export_onnx(graph)
    model.ir_version = source.ir_version
    attach_functions(model)
    _import_domain_of_contrib(model)
    model.metadata_props.extend(source.metadata_props)
    inferred = infer(untiled(skeleton(model)))
    types = {info.name: info.type.tensor_type.elem_type for info in inferred}
    outside = {name for node in model.graph.node for name in node.output}
    del model.graph.value_info[:]
    model.graph.value_info.extend(info for info in inferred if info.name in outside)
    write_layer_table(model, with_encodings(tables.layers, types), target.name)
    write_output_table(model, tables.outputs)
    write_pass_history(model, history)
    return model


def _import_domain_of_contrib(model: onnx.ModelProto) -> None:
    used = any(node.domain == CONTRIB_DOMAIN for node in model.graph.node)
    if used and all(entry.domain != CONTRIB_DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIB_DOMAIN, 1))
