"""The fake quantizer: its name, inputs and attributes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx

from plugins.body import Body
from plugins.domain import BODY_OPSET, AttributeValue, plugin_attributes
from plugins.fake_quantize import function_body
from plugins.formats import ACTIVATION_FORMATS, UnknownFormatError, get_format

_NAME = re.compile(r"FloatFakeQuantize_(?P<format>[a-z0-9]+)(?:_g(?P<group>[1-9]\d*))?")


@dataclass(frozen=True)
class FakeQuantize:
    """FloatFakeQuantize_<format>[_g<G>]: x f32 [..., N] → x_hat f32 [..., N], values on the format's grid times scales.

    One scale per token, or with `group_size` one for so many neighbours of a token, computed from their own largest
    magnitude. Raises UnknownFormatError for a format that activations do not have.
    """

    format: str
    group_size: int = 0

    def __post_init__(self) -> None:
        get_format(self.format)
        if self.format not in ACTIVATION_FORMATS:
            raise UnknownFormatError(f"{self.format!r} is no activation format; valid: {', '.join(ACTIVATION_FORMATS)}")

    @property
    def op_type(self) -> str:
        """Node type."""
        return f"FloatFakeQuantize_{self.format}" + (f"_g{self.group_size}" if self.group_size else "")

    @classmethod
    def parse(cls, op_type: str) -> FakeQuantize | None:
        """The variant of that name, None if it is another operator's. Raises UnknownFormatError."""
        match = _NAME.fullmatch(op_type)
        return None if match is None else cls(match["format"], int(match["group"] or 0))

    @property
    def input_names(self) -> tuple[str, ...]:
        """Inputs in order."""
        return ("x",)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Outputs in order."""
        return ("x_hat",)

    def attributes(self, layer: str) -> dict[str, AttributeValue]:
        """All attributes of a node that rounds the output of `layer` (a module path)."""
        return {"layer": layer, "format": self.format, "group_size": self.group_size, **plugin_attributes()}

    def function(self, opset: int = BODY_OPSET) -> onnx.FunctionProto:
        """The operator in standard operators."""
        body = Body()
        function_body.append_fake_quantize(body, "x", "x_hat", get_format(self.format), self.group_size)
        names = tuple(self.attributes(layer=""))
        doc = f"Rounds every token to {self.format} with scales amax / max, and back."
        return body.function(self.op_type, self.input_names, self.output_names, names, opset, doc)
