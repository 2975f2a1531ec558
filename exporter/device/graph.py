"""A lowered graph as the device reads it: what it is for, its quantized layers and its plugins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from exporter.errors import InputError
from exporter.layer_entries import LayerEntry, read_layer_table, target_of
from exporter.onnx_files import nodes_of, read_model, with_initializers
from exporter.targets import TARGETS, Target
from plugins.kernels.library import kernels_folder
from plugins.op import UnknownOperatorError, is_ours, parse


@dataclass(frozen=True)
class LoweredGraph:
    """`model` has no values of its constants; `plugins` are the op_types of plugin nodes."""

    path: Path
    model: onnx.ModelProto
    lowered_for: Target
    layers: tuple[LayerEntry, ...]
    plugins: tuple[str, ...]

    @property
    def kernels(self) -> Path | None:
        """The folder of the plugins' kernels, None for a graph without plugins."""
        return kernels_folder(self.path) if self.plugins else None


def read_lowered(path: Path) -> LoweredGraph:
    """Read a graph that an export lowered for TensorRT.

    Raises `InputError` for what is no ONNX file, for a graph of other origin, one that is not lowered yet and one that
    is for ONNX Runtime, each with what to do instead.
    """
    model = _without_values(read_model(path, external_data=False))
    target = TARGETS.get(target_of(model) or "")
    if target is None:
        raise InputError(
            f"{path}: not a graph that fp4export lowered; where PyTorch is installed, run `fp4export {path.name} "
            "--format e2m1 -o OUT.plan --target TARGET` and build OUT.work/lowered.TARGET.onnx"
        )
    plugins = tuple(sorted({node.op_type for node in nodes_of(model.graph.node) if is_ours(node)}))
    waist = next((op_type for op_type in plugins if not is_plugin(op_type)), None)
    if waist is not None:
        raise InputError(
            f"{path}: has {waist}, so it is not lowered yet; build lowered.TARGET.onnx from the same folder, or, "
            f"where PyTorch is installed, run `fp4export {path.name} -o OUT.plan --target TARGET` first"
        )
    if target.engine == "onnxruntime":
        raise InputError(
            f"{path}: was lowered for ONNX Runtime (target {target.name}), which runs it as it is; export again with "
            "--target and the name of the machine that the engine is for"
        )
    return LoweredGraph(path, model, target, read_layer_table(model), plugins)


def _without_values(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its constants' names, types and shapes alone: the builder, which reads the file itself, needs the
    memory."""
    constants = model.graph.initializer
    described = [onnx.TensorProto(name=one.name, data_type=one.data_type, dims=one.dims) for one in constants]
    return with_initializers(model, described)


def is_plugin(op_type: str) -> bool:
    """Whether an operator of the project's domain is a TensorRT plugin, i.e. has kernels, and not one of the waist."""
    try:
        return hasattr(parse(op_type), "kernels")
    except (UnknownOperatorError, ValueError):
        return False
