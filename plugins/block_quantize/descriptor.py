"""The block quantizer operators: names, inputs, attributes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx

from plugins.block_quantize import function_body
from plugins.block_scales import BLOCK_SCALINGS, BlockScaling, scaling_with
from plugins.body import Body
from plugins.domain import BODY_OPSET, AttributeValue, plugin_attributes
from plugins.formats import UnknownFormatError

_NAME = re.compile(r"FloatQuantizeBlocks_(?P<values>[a-z0-9]+)_g(?P<group>\d+)_(?P<scales>[a-z0-9]+)")


@dataclass(frozen=True)
class QuantizeBlocks:
    """FloatQuantizeBlocks_<values>_g<G>_<scales>: x f32 [..., K] → values f32 [..., K], scales f32 [..., K/G].

    A second input `tensor_scale` f32 [] where the scaling has one; the scales have it in them.
    """

    scaling: BlockScaling

    @property
    def op_type(self) -> str:
        """Node type."""
        facts = self.scaling
        return f"FloatQuantizeBlocks_{facts.value_format}_g{facts.group_size}_{facts.scale_format}"

    @property
    def format(self) -> str:
        """The format of the values."""
        return self.scaling.value_format

    @classmethod
    def parse(cls, op_type: str) -> QuantizeBlocks | None:
        """The variant of that name, None if it is another operator's. Raises UnknownFormatError."""
        match = _NAME.fullmatch(op_type)
        if match is None:
            return None
        scaling = scaling_with(match["values"], int(match["group"]), match["scales"])
        if scaling is None:
            known = ", ".join(cls(entry).op_type for entry in BLOCK_SCALINGS.values())
            raise UnknownFormatError(f"{op_type!r} is no block scaling; valid: {known}")
        return cls(scaling)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Inputs in order."""
        return ("x", "tensor_scale") if self.scaling.has_tensor_scale else ("x",)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Outputs in order."""
        return ("values", "scales")

    def attributes(self, layer: str) -> dict[str, AttributeValue]:
        """All attributes of a node that serves `layer` (a module path)."""
        return {
            "layer": layer,
            "format": self.scaling.value_format,
            "group_size": self.scaling.group_size,
            "scale_format": self.scaling.scale_format,
            "axis": -1,
            **plugin_attributes(),
        }

    def function(self, opset: int = BODY_OPSET) -> onnx.FunctionProto:
        """The operator in standard operators."""
        body = Body()
        tensor_scale = "tensor_scale" if self.scaling.has_tensor_scale else None
        function_body.append_quantize_blocks(body, "x", tensor_scale, "values", "scales", self.scaling)
        doc = f"Quantizes groups of {self.scaling.group_size} to {self.format} with {self.scaling.scale_format} scales."
        names = tuple(self.attributes(layer=""))
        return body.function(self.op_type, self.input_names, self.output_names, names, opset, doc)
