"""The packed linear operator: names, inputs, element types, and its kernels."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import onnx
from onnx import TensorProto

from plugins.containers import INT8, fits, multipliers
from plugins.domain import BODY_OPSET, AttributeValue, plugin_attributes
from plugins.formats import Format, UnknownFormatError, get_format
from plugins.kernels.hardware import hardware_of
from plugins.kernels.spec import KernelSpec
from plugins.packed_linear import function_body, tactics
from plugins.packed_linear.encoding import Element, Encoding
from plugins.packed_linear.layout import Layout
from plugins.weight import check_weight

PACKED_FORMATS = ("e2m1", "e1m2", "e3m0", "int4", "e2m3", "e3m2")
WEIGHT_ONLY = "none"
OPERANDS: Mapping[str, Element | None] = MappingProxyType(
    {"int8": Element.INT8, "fp8": Element.FP8, "fp16": Element.FP16, WEIGHT_ONLY: None}
)
"""What tensor cores multiply in each container; floats that are not quantized are multiplied as they are."""

FLOATS: Mapping[str, int] = MappingProxyType(
    {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
)
NUMBERS: Mapping[str, int] = MappingProxyType(
    {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN, "fp16": TensorProto.INT8}
)
"""The tensors that carry activations. FP16 products take E4M3 numbers as bytes: their GPUs have no type for them."""

GroupFactors = Literal["", "multipliers", "scales"]

_MAX_INT32 = 2**31 - 1
_NAME = re.compile(
    r"PackedLinear_(?P<weight>[a-z0-9]+)_(?P<container>[a-z0-9]+)_(?P<float>[a-z0-9]+)_n(?P<n>\d+)_k(?P<k>\d+)"
    r"(?:_g(?P<group>[1-9]\d*)(?P<factors>[ms]))?(?P<bias>_bias)?(?P<gelu>_gelu)?(?P<residual>_residual)?"
)


class VariantError(ValueError):
    """A combination that has no kernel."""


@dataclass(frozen=True)
class PackedLinear:
    """PackedLinear_<weight>_<container>_<float>_n<N>_k<K>[_g<G>m|_g<G>s][_bias][_gelu][_residual] → y <float> [..., N].

    y = Σ_k numbers·weights · x_scales · weight_scales (+ bias), through tanh-GELU with `_gelu`; with `_residual`
    residual + gate·(…). Weights are numerators (value / step) in INT8 and values in float containers.

    Inputs: numbers [..., K] and x_scales f32 [..., 1] (x <float> [..., K] alone in container ``none``); words i32
    [N, W] as `layout` packs them; weight_scales f32 [N, 1], or [N, K/G] with `s`; multipliers i8 [N, K/G] with `m`,
    factors of each group's sum, at least 1 (for INT8 among `containers.multipliers`, so that every weight times its
    multiplier is within ±127); bias f32 [N]; residual <float> [..., N] and gate <float> [B, 1, N], where B may be 1:
    the kernel's ``rows_per_sample`` says how many tokens in a row share one of its rows.

    Raises:
        UnknownFormatError: not a format, container or float type; names the nearest.
        GroupError: groups that do not divide K.
        VariantError: the container does not hold the weights, or its sums.
    """

    weight_format: str
    container: str
    float_type: str
    n: int
    k: int
    group_size: int = 0
    group_factors: GroupFactors = ""
    has_bias: bool = False
    has_gelu: bool = False
    has_residual: bool = False

    def __post_init__(self) -> None:
        _check_name("packed weight format", self.weight_format, PACKED_FORMATS)
        _check_name("container", self.container, tuple(OPERANDS))
        _check_name("float type", self.float_type, tuple(FLOATS))
        check_weight(self.weight_format, self.group_size, self.k)
        if self.n < 1:
            raise VariantError(f"a linear layer has at least one output feature, not {self.n}")
        if (self.group_size > 0) != (self.group_factors != ""):
            raise VariantError(f"groups of {self.group_size} with factors {self.group_factors!r}: give both or neither")
        if self.container == INT8.name:
            self._check_sums()

    def _check_sums(self) -> None:
        if not fits(self.format, INT8):
            raise VariantError(f"{self.weight_format} has values that int8 does not hold; nearest container: fp8")
        factor = multipliers(self.format, INT8)[-1] if self.group_factors == "multipliers" else 1
        product = int(INT8.max_magnitude * self.format.max_numerator * self.encoding.unit) * factor
        if self.k * product > _MAX_INT32:
            longest = _MAX_INT32 // product
            raise VariantError(f"sums of {self.k} {self.weight_format} products pass INT32; longest: {longest}")

    @property
    def op_type(self) -> str:
        """Node type."""
        groups = f"_g{self.group_size}{self.group_factors[0]}" if self.group_factors else ""
        suffix = groups + "_bias" * self.has_bias + "_gelu" * self.has_gelu + "_residual" * self.has_residual
        return f"PackedLinear_{self.weight_format}_{self.container}_{self.float_type}_n{self.n}_k{self.k}{suffix}"

    @classmethod
    def parse(cls, op_type: str) -> PackedLinear | None:
        """The variant of that name, None if it is another operator's. Raises as the class."""
        match = _NAME.fullmatch(op_type)
        if match is None:
            return None
        factors: Mapping[str | None, GroupFactors] = {None: "", "m": "multipliers", "s": "scales"}
        return cls(
            weight_format=match["weight"],
            container=match["container"],
            float_type=match["float"],
            n=int(match["n"]),
            k=int(match["k"]),
            group_size=int(match["group"] or 0),
            group_factors=factors[match["factors"]],
            has_bias=match["bias"] is not None,
            has_gelu=match["gelu"] is not None,
            has_residual=match["residual"] is not None,
        )

    @property
    def format(self) -> Format:
        """The weights' format."""
        return get_format(self.weight_format)

    @property
    def is_quantized(self) -> bool:
        """False for a weight-only layer, whose first input is x itself."""
        return self.container != WEIGHT_ONLY

    @property
    def element(self) -> Element:
        """The type in which tensor cores multiply."""
        return OPERANDS[self.container] or (Element.BF16 if self.float_type == "bf16" else Element.FP16)

    @property
    def encoding(self) -> Encoding:
        """What packed weights are in that type."""
        return Encoding(self.format, self.element)

    @property
    def layout(self) -> Layout:
        """How weight codes [N, K] become words [N, W], and back."""
        return self.encoding.layout(self.k, self.group_size)

    @property
    def input_types(self) -> Mapping[str, int]:
        """ONNX element types by input name, in order."""
        floats = FLOATS[self.float_type]
        quantized = {"numbers": NUMBERS.get(self.container, floats), "x_scales": TensorProto.FLOAT}
        optional = {
            "multipliers": (self.group_factors == "multipliers", TensorProto.INT8),
            "bias": (self.has_bias, TensorProto.FLOAT),
            "residual": (self.has_residual, floats),
            "gate": (self.has_residual, floats),
        }
        return {
            **(quantized if self.is_quantized else {"x": floats}),
            "words": TensorProto.INT32,
            "weight_scales": TensorProto.FLOAT,
            **{name: element for name, (present, element) in optional.items() if present},
        }

    @property
    def output_types(self) -> Mapping[str, int]:
        """ONNX element types by output name."""
        return {"y": FLOATS[self.float_type]}

    @property
    def input_names(self) -> tuple[str, ...]:
        """Inputs in order."""
        return tuple(self.input_types)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Outputs in order."""
        return tuple(self.output_types)

    @property
    def output_widths(self) -> tuple[int, ...]:
        """The last dimension of every output; the others are the first input's."""
        return (self.n,)

    def attributes(self, layer: str) -> dict[str, AttributeValue]:
        """All attributes of a node that serves `layer` (a module path); what the operator does is in its name."""
        return {"layer": layer, **plugin_attributes()}

    def function(self, opset: int = BODY_OPSET) -> onnx.FunctionProto:
        """The operator in standard operators."""
        return function_body.packed_linear(self, opset)

    def kernels(self, capability: tuple[int, int]) -> tuple[KernelSpec, ...]:
        """One kernel per tactic for GPUs of a compute capability, the best default first.

        Raises UnknownCapabilityError, and VariantError where tensor cores lack the container or the float type.
        """
        if not self.is_quantized and self.float_type == "fp32":
            raise VariantError(
                f"{self.op_type}: tensor cores have no exact FP32 product; weight-only layers take fp16 or bf16"
            )
        if self.element is Element.FP8 and not hardware_of(capability).has_fp8:
            label = "{}.{}".format(*capability)
            raise VariantError(f"{self.op_type}: compute capability {label} has no fp8; nearest container: fp16")
        return tactics.kernels(self, capability)


def _check_name(what: str, name: str, valid: tuple[str, ...]) -> None:
    if name in valid:
        return
    close = difflib.get_close_matches(name, valid, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"
    raise UnknownFormatError(f"unknown {what} {name!r}; {hint}")
