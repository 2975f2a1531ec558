"""Reading an ONNX model that someone exported, and bringing it into the form that the passes take."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import onnx
from onnx import inliner, version_converter

from exporter.device.graph import is_plugin
from exporter.errors import InputError
from exporter.onnx_files import read_model
from exporter.passes.driver import OPSETS, run_passes
from exporter.passes.inference import is_large, skeleton
from exporter.passes.layer_table import TARGET_KEY
from exporter.passes.squeezes import drop_noop_squeezes
from exporter.targets import Target
from plugins.op import is_ours

OLDEST_OPSET = 17
# From this version of the format on, files may hold every type that a lowering uses.
_IR_VERSION = 10
# torch.onnx's dynamo exporter notes the modules that a node comes from, outermost first, the operator last.
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"


class GraphState(Enum):
    """How far a graph has come."""

    FOREIGN = "foreign"
    WAIST = "exported"
    LOWERED = "lowered"


def state_of(model: onnx.ModelProto) -> GraphState:
    """Whether the graph has the project's operators, or had them before it was lowered, if only to plugins."""
    if any(is_ours(node) and not is_plugin(node.op_type) for node in model.graph.node):
        return GraphState.WAIST
    lowered = any(entry.key == TARGET_KEY for entry in model.metadata_props)
    return GraphState.LOWERED if lowered else GraphState.FOREIGN


def read_source(path: Path) -> onnx.ModelProto:
    """The model in `path`, weights in files of their own included.

    Raises `InputError` for what is no ONNX model, and for a graph that was lowered already.
    """
    model = read_model(path)
    if state_of(model) is GraphState.LOWERED:
        target = next(entry.value for entry in model.metadata_props if entry.key == TARGET_KEY)
        raise InputError(
            f"{path}: is quantized and lowered for target {target} already; give the model it was made from, or the "
            "exported graph in its work folder (NAME.work/exported.TARGET.onnx)"
        )
    return model


def prepared(model: onnx.ModelProto, source: str, target: Target) -> onnx.ModelProto:
    """A foreign model as the passes take it and ONNX Runtime runs it; `model` loses nothing that it computes with.

    Opsets from 17 are raised to 21, function bodies are inlined, initializers are no inputs, no-op Squeezes are gone,
    and products carry the module path that torch noted for them. Raises `InputError` for an invalid model, naming
    what is wrong or cannot be converted.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if not OLDEST_OPSET <= opset <= OPSETS[-1]:
        raise InputError(
            f"{source}: uses ONNX operators of version {opset}; export it again with one of {OLDEST_OPSET} to "
            f"{OPSETS[-1]}"
        )
    if model.graph.sparse_initializer:
        raise InputError(f"{source}: has sparse initializers, which are not supported; export it with dense ones")
    name_by_scope(model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer if is_large(tensor)}
    small = skeleton(model)
    if small.functions:
        small = inliner.inline_local_functions(small)
    if opset not in OPSETS:
        small = _converted(small, source)
    result = onnx.ModelProto()
    result.CopyFrom(small)
    del result.graph.input[:], result.graph.initializer[:]
    result.graph.initializer.extend([*weights.values(), *small.graph.initializer])
    constants = {tensor.name for tensor in result.graph.initializer}
    result.graph.input.extend(value for value in small.graph.input if value.name not in constants)
    result.ir_version = max(model.ir_version, _IR_VERSION)
    result.metadata_props.extend(model.metadata_props)
    try:
        return run_passes(result, (drop_noop_squeezes,), target)[0]
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError(f"{source}: not a valid ONNX model: {_last_line(error)}") from error


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _converted(small: onnx.ModelProto, source: str) -> onnx.ModelProto:
    try:
        return version_converter.convert_version(small, OPSETS[0])
    # The converter's C++ code reports every node it cannot convert as one of these.
    except (RuntimeError, version_converter.ConvertError, onnx.shape_inference.InferenceError) as error:
        raise InputError(
            f"{source}: cannot be converted to ONNX operators of version {OPSETS[0]}: {_last_line(error)}; export it "
            f"with one of {OPSETS[0]} to {OPSETS[-1]}"
        ) from error


def name_by_scope(model: onnx.ModelProto) -> None:
    """Give products, in place, the name `MODULE.PATH/OPERATOR`, as far as torch's exporter noted the module."""
    for node in model.graph.node:
        path = next(_paths(node), "") if node.op_type in ("MatMul", "Gemm") else ""
        if path:
            node.name = f"{path}/{node.name or node.op_type}"


def _paths(node: onnx.NodeProto) -> Iterator[str]:
    for entry in node.metadata_props:
        if entry.key == _SCOPES_KEY:
            try:
                scopes = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError):
                continue
            if isinstance(scopes, list) and len(scopes) > 1 and all(isinstance(scope, str) for scope in scopes):
                yield scopes[-2]
