"""The low-bit linear operator: names, inputs, attributes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx

from plugins.block_quantize.function_body import append_per_block
from plugins.block_scales import BlockScaling, scaling_with
from plugins.body import Body
from plugins.domain import BODY_OPSET, AttributeValue, plugin_attributes
from plugins.float_gemm import function_body
from plugins.formats import ACTIVATION_FORMATS, UnknownFormatError, get_format
from plugins.weight import GroupError, check_weight

NO_ACTIVATION_FORMAT = "none"

_GEMM = re.compile(
    r"FloatGemm_(?P<weight>[a-z0-9]+)_(?P<activation>[a-z0-9]+)_g(?P<group>\d+)_k(?P<count>\d+)"
    r"(?:_(?P<scales>[a-z0-9]+)scales)?(?P<m>_m)?(?P<packed>_packed)?(?P<bias>_bias)?"
)


@dataclass(frozen=True)
class Gemm:
    """FloatGemm_<weight>_<activation|none>_g<G>_k<K>[_<format>scales][_m][_packed][_bias] → y f32 [..., N].

    Inputs: values f32 [..., K] and x_scales f32 [..., 1] (x alone when the activation is "none"); codes u8 [N, K] or
    words i32 [N, W]; weight_scales f32 [N, 1], or [N, K/G] for group scales; multipliers i32 [N, K/G] with `_m`
    (the scales are then per channel); bias f32 [N]. With block scaling (`_<format>scales`) both x_scales, f32
    [..., K/G], and weight_scales, f32 [N, K/G], are that scaling's.
    """

    weight_format: str
    activation_format: str
    group_size: int
    count: int
    has_multipliers: bool
    packed: bool
    has_bias: bool
    scaling: BlockScaling | None = None

    def __post_init__(self) -> None:
        check_weight(self.weight_format, self.group_size, self.count)
        if self.activation_format not in (NO_ACTIVATION_FORMAT, *ACTIVATION_FORMATS):
            get_format(self.activation_format)
            raise UnknownFormatError(
                f"{self.activation_format!r} is no activation format; "
                f"valid: {', '.join((NO_ACTIVATION_FORMAT, *ACTIVATION_FORMATS))}"
            )
        if self.has_multipliers and self.group_size == 0:
            raise GroupError("multipliers belong to groups, and group size 0 is a whole channel")
        if self.scaling is not None:
            self._check_scaling(self.scaling)

    def _check_scaling(self, scaling: BlockScaling) -> None:
        if {self.weight_format, self.activation_format} != {scaling.value_format} or self.has_multipliers:
            raise UnknownFormatError(
                f"{scaling.name} scales both operands in {scaling.value_format} and has no factors"
            )
        if self.group_size != scaling.group_size:
            raise GroupError(f"{scaling.name} has groups of {scaling.group_size}, not {self.group_size}")

    @property
    def op_type(self) -> str:
        """Node type."""
        blocks = "" if self.scaling is None else f"_{self.scaling.scale_format}scales"
        suffix = blocks + "_m" * self.has_multipliers + "_packed" * self.packed + "_bias" * self.has_bias
        formats = f"{self.weight_format}_{self.activation_format}"
        return f"FloatGemm_{formats}_g{self.group_size}_k{self.count}{suffix}"

    @classmethod
    def parse(cls, op_type: str) -> Gemm | None:
        """The variant of that name, None if it is another operator's. Raises UnknownFormatError, GroupError."""
        match = _GEMM.fullmatch(op_type)
        if match is None:
            return None
        scaling = None
        if match["scales"] is not None:
            scaling = scaling_with(match["weight"], int(match["group"]), match["scales"])
            if scaling is None:
                raise UnknownFormatError(f"{op_type!r}: no block scaling has these formats and groups")
        return cls(
            weight_format=match["weight"],
            activation_format=match["activation"],
            group_size=int(match["group"]),
            count=int(match["count"]),
            has_multipliers=match["m"] is not None,
            packed=match["packed"] is not None,
            has_bias=match["bias"] is not None,
            scaling=scaling,
        )

    @property
    def quantizes_activations(self) -> bool:
        """False for a weight-only layer, whose first input is x itself."""
        return self.activation_format != NO_ACTIVATION_FORMAT

    @property
    def has_group_scales(self) -> bool:
        """True where weight_scales is [N, K/G] and so cannot leave the sum over K."""
        return self.group_size > 0 and not self.has_multipliers

    @property
    def input_names(self) -> tuple[str, ...]:
        """Inputs in order."""
        optional = (("multipliers",) if self.has_multipliers else ()) + (("bias",) if self.has_bias else ())
        activations = ("values", "x_scales") if self.quantizes_activations else ("x",)
        return (*activations, "words" if self.packed else "codes", "weight_scales", *optional)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Outputs in order."""
        return ("y",)

    def attributes(self, layer: str, container: str = "") -> dict[str, AttributeValue]:
        """All attributes of a node that serves `layer` (a module path).

        `container` is the one that was asked for, then the one that was chosen; "" where neither.
        """
        return {
            "layer": layer,
            "weight_format": self.weight_format,
            "activation_format": self.activation_format,
            "group_size": self.group_size,
            "count": self.count,
            "packed": int(self.packed),
            "scale_format": "" if self.scaling is None else self.scaling.scale_format,
            "container": container,
            **plugin_attributes(),
        }

    def function(self, opset: int = BODY_OPSET) -> onnx.FunctionProto:
        """The operator in standard operators."""
        body = Body()
        factors = "weight_scales" if self.has_group_scales else None
        if self.has_multipliers:
            factors = function_body.append_multipliers(body, "multipliers")
        weight = function_body.append_weight(
            body,
            "words" if self.packed else "codes",
            factors,
            get_format(self.weight_format),
            count=self.count,
            group_size=self.group_size,
            packed=self.packed,
        )
        x, x_scales = self.input_names[0], "x_scales" if self.quantizes_activations else None
        if self.scaling is not None:
            x, x_scales = append_per_block(body, "values", "x_scales", self.group_size), None
        function_body.append_product(
            body,
            x,
            weight,
            x_scales=x_scales,
            weight_scales=None if self.has_group_scales else "weight_scales",
            bias="bias" if self.has_bias else None,
        )
        doc = f"Linear layer, {self.weight_format} weights and {self.activation_format} activations."
        names = tuple(self.attributes(layer=""))
        return body.function(self.op_type, self.input_names, self.output_names, names, opset, doc)
