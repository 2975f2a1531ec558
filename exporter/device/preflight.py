"""What can be known before a build: whether the machine, its TensorRT and the graph fit each other."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import onnx
from onnx import TensorProto

from exporter.device.graph import LoweredGraph, is_plugin, nodes_of
from exporter.device.machine import package_version
from exporter.device.tensorrt_api import OLDEST_PLUGINS, load_module, module_name, version_of
from exporter.errors import EnvironmentLacksError, InputError
from exporter.gpu import Gpu, local_gpu
from exporter.targets import TARGETS, Target
from exporter.tensorrt_parsers import PARSERS, Parser, refusal
from plugins.op import is_ours

OLDEST_RTX = (1, 3)
_EVERYWHERE = ("fp16", "fp32")


def installed_version(*, rtx: bool) -> tuple[int, int] | None:
    """(major, minor) of TensorRT-RTX or of TensorRT on this machine, None without a usable one.

    Imports it only where package metadata do not tell.
    """
    name = module_name(rtx=rtx)
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return version_of(package_version(name) or str(load_module(rtx=rtx).__version__))
    except ImportError:
        return None


def missing_builder(target: Target) -> str:
    """What building for `target` needs and this machine does not have; "" if it has all."""
    if target.engine == "onnxruntime":
        return ""
    rtx = target.engine == "tensorrt-rtx"
    wrong_gpu = "" if rtx else _wrong_gpu(target, local_gpu())
    if wrong_gpu:
        return wrong_gpu
    version = installed_version(rtx=rtx)
    if version is not None:
        return _too_old(target, version)
    if rtx:
        return "TensorRT-RTX is not installed here (pip install tensorrt-rtx)"
    return "TensorRT is not installed here (pip install tensorrt; on a Jetson it comes with JetPack)"


def oldest_version(target: Target) -> tuple[int, int]:
    """The oldest TensorRT, or TensorRT-RTX, that builds for `target`."""
    if target.engine == "tensorrt-rtx":
        return OLDEST_RTX
    major, _, minor = target.parsers[0].partition(".")
    return int(major), int(minor or 0)


def _too_old(target: Target, version: tuple[int, int]) -> str:
    oldest = oldest_version(target)
    if version >= oldest:
        return ""
    name = "TensorRT-RTX" if target.engine == "tensorrt-rtx" else "TensorRT"
    here, wanted = (".".join(map(str, pair)) for pair in (version, oldest))
    return f"{name} {here} is installed here, and target {target.name} needs {wanted} or later"


def _wrong_gpu(target: Target, gpu: Gpu | None) -> str:
    if gpu is None:
        return "there is no NVIDIA GPU here, and TensorRT builds only for the GPU it runs on"
    if gpu.compute_capability == target.compute_capability:
        return ""
    fitting = [name for name, other in TARGETS.items() if other.compute_capability == gpu.compute_capability]
    can = f"; it can build for {', '.join(fitting)}" if fitting else ""
    wanted = ".".join(map(str, target.compute_capability or ()))
    return (
        f"TensorRT builds only for the GPU it runs on, here {gpu.name} with compute capability "
        f"{gpu.capability_text}, not {wanted}{can}"
    )


def parser_of(target: Target, version: tuple[int, int]) -> Parser:
    """What the parser of that version takes: the list of the newest release that is not newer.

    TensorRT-RTX has versions of its own; its parser is TensorRT 11's.
    """
    if target.engine == "tensorrt-rtx":
        return PARSERS["11"]
    known = sorted((_release(name), name) for name in PARSERS)
    return PARSERS[max((entry for entry in known if entry[0] <= version), default=known[0])[1]]


def _release(name: str) -> tuple[int, int]:
    major, _, minor = name.partition(".")
    return int(major), int(minor or 0)


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


def check_plugins(graph: LoweredGraph, target: Target, version: tuple[int, int]) -> None:
    """Raise `EnvironmentLacksError` or `InputError` for plugin nodes that cannot be built here."""
    if not graph.plugins:
        return
    if target.engine == "tensorrt-rtx":
        raise InputError(
            f"{graph.path.name}: has the plugin {graph.plugins[0]}, and TensorRT-RTX (target {target.name}) takes no "
            "plugins; export with --set kernels=native"
        )
    if version < OLDEST_PLUGINS:
        here, oldest = (".".join(map(str, pair)) for pair in (version, OLDEST_PLUGINS))
        raise EnvironmentLacksError(
            f"{graph.path.name}: has the plugin {graph.plugins[0]}, which needs TensorRT {oldest} or later, not {here}"
            "; export with --set kernels=native for this machine"
        )
    if target.compute_capability != graph.lowered_for.compute_capability:
        raise InputError(
            f"{graph.path.name}: its plugins' kernels are for {graph.lowered_for.name}; export for {target.name}"
        )


def _has(target: Target, graph: LoweredGraph) -> bool:
    wanted = {layer.container for layer in graph.layers}
    return target.engine != "onnxruntime" and wanted <= {*target.containers, *_EVERYWHERE}


def _element_types(model: onnx.ModelProto) -> Mapping[str, int]:
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types.update({tensor.name: tensor.data_type for tensor in model.graph.initializer})
    return {name: kind for name, kind in types.items() if kind != TensorProto.UNDEFINED}
