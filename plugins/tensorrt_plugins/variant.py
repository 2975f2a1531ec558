"""What TensorRT must know of an operator to have it as a plugin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from plugins.kernels.hardware import Capability
from plugins.kernels.spec import KernelSpec
from plugins.op import DOMAIN, UnknownOperatorError, parse


@runtime_checkable
class PluginVariant(Protocol):
    """An operator with kernels of ours, its formats and sizes fixed."""

    @property
    def op_type(self) -> str:
        """Node type, and the plugin's name."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Inputs in order."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """Outputs in order."""

    @property
    def input_types(self) -> Mapping[str, int]:
        """ONNX element types by input name, in order."""

    @property
    def output_types(self) -> Mapping[str, int]:
        """ONNX element types by output name, in order."""

    @property
    def output_widths(self) -> tuple[int, ...]:
        """The last dimension of every output; the others are the first input's."""

    def kernels(self, capability: Capability) -> tuple[KernelSpec, ...]:
        """One kernel per tactic, the best default first."""


def plugin_variant(op_type: str) -> PluginVariant:
    """The operator of that name. Raises UnknownOperatorError for one without kernels, and as `parse`."""
    variant = parse(op_type)
    if not isinstance(variant, PluginVariant):
        raise UnknownOperatorError(f"{op_type!r} is an operator of domain {DOMAIN!r} without kernels")
    return variant
