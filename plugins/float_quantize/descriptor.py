"""The quantizer operators: names, inputs, attributes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from plugins.body import Body
from plugins.domain import BODY_OPSET, AttributeValue, plugin_attributes
from plugins.float_quantize import function_body
from plugins.formats import ACTIVATION_FORMATS, Format, UnknownFormatError, get_format


@dataclass(frozen=True)
class OnlineQuantize:
    """FloatQuantizeOnline_<format>: x f32 [..., K] → values f32 [..., K] on the format's grid, scales f32 [..., 1].

    One scale per token, computed from the token's own largest magnitude.
    """

    format: str

    def __post_init__(self) -> None:
        _check_activation_format(self.format)

    @property
    def op_type(self) -> str:
        """Node type."""
        return f"FloatQuantizeOnline_{self.format}"

    @classmethod
    def parse(cls, op_type: str) -> OnlineQuantize | None:
        """The variant of that name, None if it is another operator's. Raises UnknownFormatError."""
        name, found, fmt = op_type.partition("_")
        return cls(fmt) if found and name == "FloatQuantizeOnline" else None

    @property
    def input_names(self) -> tuple[str, ...]:
        """Inputs in order."""
        return ("x",)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Outputs in order."""
        return ("values", "scales")

    def attributes(self, layer: str) -> dict[str, AttributeValue]:
        """All attributes of a node that serves `layer` (a module path)."""
        return {
            "layer": layer,
            "format": self.format,
            "granularity": "per_token",
            "axis": -1,
            **plugin_attributes(),
        }

    def function(self, opset: int = BODY_OPSET) -> onnx.FunctionProto:
        """The operator in standard operators."""
        body = Body()
        function_body.append_online(body, "x", "values", "scales", get_format(self.format))
        doc = f"Quantizes every token to {self.format} with scale amax / max."
        names = tuple(self.attributes(layer=""))
        return body.function(self.op_type, self.input_names, self.output_names, names, opset, doc)


@dataclass(frozen=True)
class Quantize:
    """FloatQuantize_<format>: x f32 [...], scales f32 (broadcasts to x) → values f32 [...] on the format's grid."""

    format: str

    def __post_init__(self) -> None:
        _check_activation_format(self.format)

    @property
    def op_type(self) -> str:
        """Node type."""
        return f"FloatQuantize_{self.format}"

    @classmethod
    def parse(cls, op_type: str) -> Quantize | None:
        """The variant of that name, None if it is another operator's. Raises UnknownFormatError."""
        name, found, fmt = op_type.partition("_")
        return cls(fmt) if found and name == "FloatQuantize" else None

    @property
    def input_names(self) -> tuple[str, ...]:
        """Inputs in order."""
        return ("x", "scales")

    @property
    def output_names(self) -> tuple[str, ...]:
        """Outputs in order."""
        return ("values",)

    def attributes(self, layer: str) -> dict[str, AttributeValue]:
        """All attributes of a node that serves `layer` (a module path)."""
        return {"layer": layer, "format": self.format, "axis": -1, **plugin_attributes()}

    def function(self, opset: int = BODY_OPSET) -> onnx.FunctionProto:
        """The operator in standard operators."""
        body = Body()
        function_body.append_given(body, "x", "scales", "values", get_format(self.format))
        doc = f"Quantizes x / scales to {self.format}."
        names = tuple(self.attributes(layer=""))
        return body.function(self.op_type, self.input_names, self.output_names, names, opset, doc)


def _check_activation_format(name: str) -> Format:
    fmt = get_format(name)
    if name not in ACTIVATION_FORMATS:
        raise UnknownFormatError(f"{name!r} is no activation format; valid: {', '.join(ACTIVATION_FORMATS)}")
    return fmt
