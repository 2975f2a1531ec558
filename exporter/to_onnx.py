"""torch → ONNX: the waist graph, one custom node per quantizer and dequantizer, batch size dynamic."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from torch import Tensor, nn

from exporter.models.adapter import Adapter
from exporter.models.inputs import TransformerInputs, shared_inputs
from exporter.onnx_files import save_onnx
from exporter.symbolic import symbolic_boundary
from exporter.transformer_config import write_transformer_config
from plugins.op import attach_functions

# Opset 23 turns scaled dot-product attention into `Attention`, whose broadcast mask ONNX Runtime rejects.
OPSET = 21


def to_onnx(
    model: nn.Module, adapter: Adapter, example: TransformerInputs, path: Path, final: Path | None = None
) -> None:
    """Export `model` (its quantized linears as custom nodes) to the file `path`, which becomes `final` later if given.

    `example` fixes every size but the batch, which must be at least 2 (torch specialises sizes 0 and 1). Inputs
    keep the adapter's names, the output is called `sample`, and every block's inputs and output carry a
    `FloatBoundary` marker with the block's module path. Weights too large for one file go to a second one, see
    `save_onnx`.
    """
    module = adapter.forward_module(model, example)
    names = adapter.input_names(model)
    inputs = example.as_dict()
    arguments = tuple(inputs[name] for name in names)
    batch = torch.export.Dim("batch", min=1, max=4096)
    each = tuple({0: batch} for _ in arguments)
    # One parameter that takes all (*tensors) has one entry for all.
    shapes = (each,) if len(inspect.signature(module.forward).parameters) < len(arguments) else each
    with torch.no_grad(), _boundaries(adapter.blocks(model), adapter.skips(model)), _quiet():
        program = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=names, output_names=["sample"], verbose=False
        )
    if exported is None:
        raise RuntimeError("torch.onnx.export returned no program")
    graph = exported.model_proto
    _tidy(graph, module, model)
    write_transformer_config(graph, type(model).__name__, cast(Any, model).config)
    attach_functions(graph)
    save_onnx(graph, path, final=final)


@contextmanager
def _boundaries(blocks: list[tuple[str, nn.Module]], skips: Mapping[str, Mapping[str, str]]) -> Iterator[None]:
    """Mark every block's float inputs and its output while the model is being traced.

    What a block takes from an earlier one by a skip is that one's output, marked already.
    """
    handles = []
    for name, block in blocks:

        def mark_inputs(
            _module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            name: str = name,
            taken: Collection[str] = tuple(skips.get(name, ())),
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden, *rest = args
            shared = {
                key: symbolic_boundary(value, f"blocks.{key}") if key in shared_inputs(kwargs, taken) else value
                for key, value in kwargs.items()
            }
            return (symbolic_boundary(hidden, f"{name}.input"), *rest), shared

        def mark_output(_module: nn.Module, _args: tuple[Any, ...], output: Tensor, name: str = name) -> Tensor:
            return symbolic_boundary(output, f"{name}.output")

        handles.append(block.register_forward_pre_hook(mark_inputs, with_kwargs=True))
        handles.append(block.register_forward_hook(mark_output))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tidy(graph: onnx.ModelProto, module: nn.Module, model: nn.Module) -> None:
    """Name the batch dimension `batch` and drop the wrapper's prefix from the initializers' names."""
    prefix = next((f"{name}." for name, child in module.named_children() if child is model), "")
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes on optional packages; its errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
