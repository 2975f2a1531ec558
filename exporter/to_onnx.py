"""torch → ONNX: the waist graph, one custom node per quantizer and dequantizer, batch size dynamic."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import onnx
import onnx_ir as ir
from torch import nn

from exporter.block_calls import NotRepeatedError
from exporter.models.adapter import Adapter
from exporter.models.inputs import TransformerInputs
from exporter.onnx_files import LARGEST_WORK_FILE_BYTES, save_onnx
from exporter.progress import Progress
from exporter.repeated_blocks import repeat_blocks, with_placeholders
from exporter.tracing import batch_axis, marked_boundaries, trace
from exporter.transformer_config import write_transformer_config
from plugins.op import attach_functions


def to_onnx(
    model: nn.Module,
    adapter: Adapter,
    example: TransformerInputs,
    path: Path,
    final: Path | None = None,
    progress: Progress | None = None,
    *,
    repeat: bool = True,
) -> None:
    """Export `model` (its quantized linears as custom nodes) to the file `path`, which becomes `final` later if given.

    `example` fixes every size but the batch, which must be at least 2 (torch specialises sizes 0 and 1). Inputs
    keep the adapter's names, the output is called `sample`, and every block's inputs and output carry a
    `FloatBoundary` marker with the block's module path. With `repeat`, blocks that are
    alike are traced once; a note to `progress` says if none are. Weights too large for one file go to a second one, see
    `save_onnx`.
    """
    try:
        traced, prefix = (_trace_repeated if repeat else _trace_whole)(model, adapter, example)
    except NotRepeatedError as reason:
        if progress is not None:
            progress.note(f"tracing every block: {reason}")
        traced, prefix = _trace_whole(model, adapter, example)
    graph: onnx.ModelProto = ir.serde.serialize_model(traced)
    _tidy(graph, prefix)
    write_transformer_config(graph, type(model).__name__, cast(Any, model).config)
    attach_functions(graph)
    save_onnx(graph, path, LARGEST_WORK_FILE_BYTES, final)


def _trace_repeated(model: nn.Module, adapter: Adapter, example: TransformerInputs) -> tuple[ir.Model, str]:
    """What `_trace` gives, by one trace for each kind of block. Raises `NotRepeatedError`."""
    blocks, skips = adapter.blocks(model), adapter.skips(model)
    outer, calls = with_placeholders(model, blocks)
    traced, prefix = _trace(outer, adapter, example)
    repeat_blocks(traced, model, blocks, skips, calls, prefix)
    return traced, prefix


def _trace_whole(model: nn.Module, adapter: Adapter, example: TransformerInputs) -> tuple[ir.Model, str]:
    with marked_boundaries(adapter.blocks(model), adapter.skips(model)):
        return _trace(model, adapter, example)


def _trace(model: nn.Module, adapter: Adapter, example: TransformerInputs) -> tuple[ir.Model, str]:
    """The graph, and what its weights' names have in front of their paths in `model`."""
    module = adapter.forward_module(model, example)
    names = adapter.input_names(model)
    inputs = example.as_dict()
    arguments = tuple(inputs[name] for name in names)
    batch = batch_axis()
    each = tuple({0: batch} for _ in arguments)
    # One parameter that takes all (*tensors) has one entry for all.
    shapes = (each,) if len(inspect.signature(module.forward).parameters) < len(arguments) else each
    prefix = next((f"{name}." for name, child in module.named_children() if child is model), "")
    return trace(module, arguments, shapes, names, "sample"), prefix


def _tidy(graph: onnx.ModelProto, prefix: str) -> None:
    """Name the batch dimension `batch` and drop `prefix` from the initializers' names."""
    renamed = {
        tensor.name: tensor.name.removeprefix(prefix)
        for tensor in graph.graph.initializer
        if prefix and tensor.name.startswith(prefix)
    }
    for tensor in graph.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in graph.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    symbol = graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    del graph.graph.value_info[:]
    for value in (*graph.graph.input, *graph.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == symbol:
                dimension.dim_param = "batch"
