"""A marker that gives a tensor a name which survives export and passes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from plugins.body import Body
from plugins.domain import BODY_OPSET, AttributeValue, plugin_attributes


@dataclass(frozen=True)
class Boundary:
    """FloatBoundary: x → y, the same tensor; attribute `name` says which one it is."""

    @property
    def op_type(self) -> str:
        """Node type."""
        return "FloatBoundary"

    @classmethod
    def parse(cls, op_type: str) -> Boundary | None:
        """The variant of that name, None if it is another operator's."""
        return cls() if op_type == cls().op_type else None

    @property
    def input_names(self) -> tuple[str, ...]:
        """Inputs in order."""
        return ("x",)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Outputs in order."""
        return ("y",)

    def attributes(self, name: str) -> dict[str, AttributeValue]:
        """All attributes of the marker of the tensor `name`."""
        return {"name": name, **plugin_attributes()}

    def function(self, opset: int = BODY_OPSET) -> onnx.FunctionProto:
        """The operator in standard operators."""
        body = Body()
        body.op("Identity", "x", output="y")
        names = tuple(self.attributes(name=""))
        return body.function(
            self.op_type, self.input_names, self.output_names, names, opset, "Names its input; computes nothing."
        )
