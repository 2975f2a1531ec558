"""What can be known of a graph before it is built: whether the target and its TensorRT can run it."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto

from exporter.device.graph import LoweredGraph, is_plugin
from exporter.device.requirements import release_of
from exporter.errors import EnvironmentLacksError, InputError
from exporter.onnx_files import nodes_of
from exporter.targets import TARGETS, Target
from exporter.tensorrt_parsers import PARSERS, Parser, refusal
from plugins.kernels.library import KernelLibrary, KernelLibraryError, kernels_folder
from plugins.op import is_ours
from plugins.tensorrt_plugins.releases import OLDEST_TENSORRT

_EVERYWHERE = ("fp16", "fp32")


def parser_of(target: Target, version: tuple[int, int]) -> Parser:
    """What the parser of that version takes: the list of the newest release that is not newer.

    TensorRT-RTX has versions of its own; its parser is TensorRT 11's.
    """
    if target.engine == "tensorrt-rtx":
        return PARSERS["11"]
    known = sorted((release_of(name), name) for name in PARSERS)
    return PARSERS[max((entry for entry in known if entry[0] <= version), default=known[0])[1]]


def check_graph(graph: LoweredGraph, target: Target, version: tuple[int, int]) -> None:
    """Raise `InputError` naming the first layer or node that `target` cannot run with that TensorRT.

    Plugins aside, that is a layer in a container that the GPU has not, an operator or element type that the parser
    does not take, or a matrix product that the builder has not.
    """
    name = graph.path.name
    for layer in graph.layers:
        if layer.container not in (*target.containers, *_EVERYWHERE) and not graph.plugins:
            fitting = [other.name for other in TARGETS.values() if _has(other, graph)]
            raise InputError(
                f"{name}: layer {layer.layer} is in container {layer.container}, which target {target.name} does not "
                f"multiply in; targets that do: {', '.join(fitting) or 'none'}; or export for {target.name}"
            )
    if not target.fp32_products and graph.lowered_for.fp32_products:
        raise InputError(
            f"{name}: was lowered for {graph.lowered_for.name}, whose matrix products have FP32 results, which "
            f"{target.name} has not; export with --target {target.name} --set compute=fp16"
        )
    parser, types = parser_of(target, version), _element_types(graph.model)
    for node in nodes_of(graph.model.graph.node):
        if is_ours(node) and is_plugin(node.op_type):
            continue
        tensors = {tensor: types[tensor] for tensor in (*node.input, *node.output) if tensor in types}
        reason = refusal(node.domain, node.op_type, tensors, parser)
        if reason:
            raise InputError(f"{name}: node {node.name or node.output[0]!r}: target {target.name} cannot run {reason}")


def check_kernels(graph: LoweredGraph, target: Target) -> None:
    """Raise `InputError` for plugin nodes that no machine could build for `target`: TensorRT-RTX takes none, and the
    folder beside the graph must have every kernel for the target's GPU, undamaged."""
    if not graph.plugins:
        return
    if target.engine == "tensorrt-rtx":
        raise InputError(
            f"{graph.path.name}: has the plugin {graph.plugins[0]}, and TensorRT-RTX (target {target.name}) takes no "
            "plugins; export with --set kernels=native"
        )
    try:
        library = KernelLibrary.load(kernels_folder(graph.path))
        for op_type in graph.plugins:
            library.tactics(op_type, target.compute_capability or (0, 0))
    except KernelLibraryError as error:
        raise InputError(f"{graph.path.name}: {error}") from error


def check_version(graph: LoweredGraph, version: tuple[int, int]) -> None:
    """Raise `EnvironmentLacksError` where this TensorRT is too old for the graph's plugins."""
    if graph.plugins and version < OLDEST_TENSORRT:
        here, oldest = (".".join(map(str, pair)) for pair in (version, OLDEST_TENSORRT))
        raise EnvironmentLacksError(
            f"{graph.path.name}: has the plugin {graph.plugins[0]}, which needs TensorRT {oldest} or later, not {here}"
            "; export with --set kernels=native for this machine"
        )


def _has(target: Target, graph: LoweredGraph) -> bool:
    wanted = {layer.container for layer in graph.layers}
    return target.engine != "onnxruntime" and wanted <= {*target.containers, *_EVERYWHERE}


def _element_types(model: onnx.ModelProto) -> Mapping[str, int]:
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types.update({tensor.name: tensor.data_type for tensor in model.graph.initializer})
    return {name: kind for name, kind in types.items() if kind != TensorProto.UNDEFINED}
