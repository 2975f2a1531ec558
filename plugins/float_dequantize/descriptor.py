"""The dequantizer operators: names, inputs, attributes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx

from plugins.block_quantize.function_body import append_per_block
from plugins.body import Body
from plugins.domain import AUTO_CONTAINER, BODY_OPSET, AttributeValue, plugin_attributes
from plugins.float_dequantize import function_body
from plugins.formats import get_format
from plugins.weight import check_weight

_VALUES = re.compile(r"FloatDequantize_values(?:_g(?P<group>[1-9]\d*))?")
_WEIGHT = re.compile(r"FloatDequantize_(?P<format>[a-z]\w+?)_g(?P<group>\d+)_k(?P<count>\d+)(?P<packed>_packed)?")


@dataclass(frozen=True)
class DequantizeValues:
    """FloatDequantize_values[_g<G>]: values f32 [..., K], scales f32 [..., 1] or [..., K/G] → x_hat f32 [..., K].

    `group_size` 0 is a whole token.
    """

    group_size: int = 0

    @property
    def op_type(self) -> str:
        """Node type."""
        return "FloatDequantize_values" + (f"_g{self.group_size}" if self.group_size else "")

    @classmethod
    def parse(cls, op_type: str) -> DequantizeValues | None:
        """The variant of that name, None if it is another operator's."""
        match = _VALUES.fullmatch(op_type)
        return None if match is None else cls(int(match["group"] or 0))

    @property
    def input_names(self) -> tuple[str, ...]:
        """Inputs in order."""
        return ("values", "scales")

    @property
    def output_names(self) -> tuple[str, ...]:
        """Outputs in order."""
        return ("x_hat",)

    def attributes(self, layer: str) -> dict[str, AttributeValue]:
        """All attributes of a node that serves `layer` (a module path)."""
        return {"layer": layer, **plugin_attributes()}

    def function(self, opset: int = BODY_OPSET) -> onnx.FunctionProto:
        """The operator in standard operators."""
        body = Body()
        if self.group_size:
            append_per_block(body, "values", "scales", self.group_size, output="x_hat")
        else:
            body.op("Mul", "values", "scales", output="x_hat")
        names = tuple(self.attributes(layer=""))
        return body.function(
            self.op_type, self.input_names, self.output_names, names, opset, "Grid values times their scales."
        )


@dataclass(frozen=True)
class DequantizeWeight:
    """FloatDequantize_<format>_g<G>_k<K>[_packed]: codes, scales → w f32 [N, K].

    Codes are u8 [N, K], or INT32 words [N, W] when packed; scales f32 [N, K/G], or [N, 1] for G = 0.
    """

    format: str
    group_size: int
    count: int
    packed: bool

    def __post_init__(self) -> None:
        check_weight(self.format, self.group_size, self.count)

    @property
    def op_type(self) -> str:
        """Node type."""
        return f"FloatDequantize_{self.format}_g{self.group_size}_k{self.count}{'_packed' * self.packed}"

    @classmethod
    def parse(cls, op_type: str) -> DequantizeWeight | None:
        """The variant of that name, None if it is another operator's. Raises UnknownFormatError, GroupError."""
        match = _WEIGHT.fullmatch(op_type)
        if match is None:
            return None
        return cls(match["format"], int(match["group"]), int(match["count"]), match["packed"] is not None)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Inputs in order."""
        return ("words" if self.packed else "codes", "scales")

    @property
    def output_names(self) -> tuple[str, ...]:
        """Outputs in order."""
        return ("w",)

    def attributes(self, layer: str, container: str = AUTO_CONTAINER) -> dict[str, AttributeValue]:
        """All attributes of a node that serves `layer` (a module path); `container` is the one asked for."""
        return {
            "layer": layer,
            "format": self.format,
            "group_size": self.group_size,
            "count": self.count,
            "packed": int(self.packed),
            "container": container,
            **plugin_attributes(),
        }

    def function(self, opset: int = BODY_OPSET) -> onnx.FunctionProto:
        """The operator in standard operators."""
        body = Body()
        stored, scales = self.input_names
        decoded = function_body.append_decode(body, stored, get_format(self.format), self.count, self.packed)
        function_body.append_per_group(body, decoded, scales, self.count, self.group_size, output="w")
        doc = f"Weights from {self.format} codes and their scales."
        names = tuple(self.attributes(layer=""))
        return body.function(self.op_type, self.input_names, self.output_names, names, opset, doc)
