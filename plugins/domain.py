"""Names of the operator domain, shared by every operator's description."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import onnx

DOMAIN = "fp4export"
OPSET_VERSION = 1
PLUGIN_VERSION = "1"

AUTO_CONTAINER = "auto"
"""Attribute `container` of a weight whose number container is the target's choice."""

BODY_OPSET = 21
"""Version of the standard operators in function bodies unless the model asks for another."""

MIN_BODY_OPSET = 18
"""The first version in which ReduceMax takes its axes as an input."""

AttributeValue: TypeAlias = str | int


class Variant(Protocol):
    """One operator with its formats and constants fixed: what one op_type, and one function, stands for."""

    @property
    def op_type(self) -> str:
        """Globally unique node type."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Inputs in order."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """Outputs in order."""

    def function(self, opset: int = BODY_OPSET) -> onnx.FunctionProto:
        """The operator in standard operators."""


def plugin_attributes() -> dict[str, AttributeValue]:
    """The attributes by which TensorRT finds a plugin; explicit on every node."""
    return {"plugin_namespace": DOMAIN, "plugin_version": PLUGIN_VERSION}
