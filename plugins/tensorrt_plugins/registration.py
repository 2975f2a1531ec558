"""Registers operators with TensorRT as quickly deployable plugins (`tensorrt.plugin`, TensorRT 10.9 and later).

An engine that is built with them holds their PTX and needs neither Python nor any library when it runs. TensorRT looks
at the signatures of the functions that describe a plugin, so each gets one made from its operator's description.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable
from typing import Any

import onnx

from plugins.domain import DOMAIN
from plugins.kernels.hardware import Capability
from plugins.kernels.library import KernelLibrary, LibraryKernel
from plugins.op import is_ours
from plugins.tensorrt_plugins.launch import launch
from plugins.tensorrt_plugins.releases import OLDEST_TENSORRT
from plugins.tensorrt_plugins.types import type_name, type_names
from plugins.tensorrt_plugins.variant import PluginVariant, plugin_variant

# TensorRT's own tactics are not positive.
_FIRST_TACTIC = 1


class PluginError(RuntimeError):
    """This TensorRT cannot have the plugins, or has one of them already."""


def plugin_op_types(model: onnx.ModelProto) -> tuple[str, ...]:
    """The operators of a graph that TensorRT must have as plugins, sorted.

    Raises UnknownOperatorError for an operator of the project's domain that is none.
    """
    names = sorted({node.op_type for node in model.graph.node if is_ours(node)})
    return tuple(plugin_variant(name).op_type for name in names)


def register(op_types: Iterable[str], library: KernelLibrary, capability: Capability) -> None:
    """Make each operator a plugin of this process's TensorRT, with `library`'s kernels for GPUs of `capability`.

    A plugin is called as its operator, in the namespace of the project's domain, and has no fields: op_types say all
    that a kernel depends on. Tactics are the library's, counted from 1. Every kernel is looked up before the first
    plugin is registered.

    Raises:
        PluginError: TensorRT is older than `OLDEST_TENSORRT`, or an operator is registered already.
        KernelLibraryError: a kernel is missing.
        UnknownOperatorError: an op_type is no operator with kernels.
    """
    trtp = _plugin_api()
    wanted = [(plugin_variant(name), library.tactics(name, capability)) for name in sorted(set(op_types))]
    known = getattr(trtp.op, DOMAIN, None)
    for variant, _ in wanted:
        if known is not None and hasattr(known, variant.op_type):
            raise PluginError(f"{variant.op_type} is registered already: build one engine in a process")
    for variant, kernels in wanted:
        _register(trtp, variant, kernels)


def _plugin_api() -> Any:
    """`tensorrt.plugin`, if it compiles ahead of time."""
    import tensorrt

    # Releases since 10.7 tell parsers which kind of plugin is asked for, those since 10.9 take it from an ONNX file.
    version = tuple(int(part) for part in tensorrt.__version__.split(".")[:2])
    if version < OLDEST_TENSORRT:
        oldest = ".".join(map(str, OLDEST_TENSORRT))
        raise PluginError(
            f"TensorRT {tensorrt.__version__} has no plugins that are compiled ahead of time (they begin with "
            f"{oldest}; JetPack 6 stays on 10.3): export with `kernels: native`, or update TensorRT"
        )
    import tensorrt.plugin as trtp

    return trtp


def _register(trtp: Any, variant: PluginVariant, kernels: tuple[LibraryKernel, ...]) -> None:
    plugin = f"{DOMAIN}::{variant.op_type}"
    tensors = dict.fromkeys(variant.input_names, trtp.TensorDesc)
    outputs = types.GenericAlias(tuple, (trtp.TensorDesc,) * len(variant.output_names))
    by_tactic = dict(enumerate(kernels, start=_FIRST_TACTIC))
    combination = ", ".join(type_names((*variant.input_types.values(), *variant.output_types.values())))

    def describe(*inputs: Any) -> Any:
        leading = tuple(inputs[0].shape_expr)[:-1]
        return tuple(
            trtp.from_shape_expr((*leading, width), _data_type(element))
            for width, element in zip(variant.output_widths, variant.output_types.values(), strict=True)
        )

    def autotune(*_tensors: Any) -> Any:
        return [trtp.AutoTuneCombination(combination, "LINEAR", list(by_tactic))]

    def implement(*arguments: Any) -> Any:
        *inputs, _outputs, tactic = arguments
        kernel = by_tactic[tactic]
        parameters, scalars = launch(trtp, kernel, [tensor.shape_expr for tensor in inputs])
        return kernel.entry, kernel.ptx, parameters, scalars

    implementation = types.GenericAlias(tuple, (str, str, trtp.KernelLaunchParams, trtp.SymIntExprs))
    combinations = types.GenericAlias(list, trtp.AutoTuneCombination)
    made = {**tensors, "outputs": outputs}
    trtp.register(plugin)(_with_signature(describe, tensors, outputs))
    trtp.autotune(plugin)(_with_signature(autotune, made, combinations))
    trtp.aot_impl(plugin)(_with_signature(implement, {**made, "tactic": int}, implementation))


def _data_type(element_type: int) -> Any:
    import tensorrt

    aliases = {"FP32": "FLOAT", "FP16": "HALF"}
    name = type_name(element_type)
    return getattr(tensorrt.DataType, aliases.get(name, name))


def _with_signature(function: Any, parameters: dict[str, Any], returns: Any) -> Any:
    """The function, presenting itself with these annotated parameters by position."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()],
        return_annotation=returns,
    )
    return function
