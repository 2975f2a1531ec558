"""What the three quantizers of plugins have in common: their names, their outputs and their kernels' constants."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import ClassVar, TypeVar

from onnx import TensorProto

from plugins.containers import FP8, FP16
from plugins.domain import AttributeValue, plugin_attributes
from plugins.formats import ACTIVATION_FORMATS, Format, UnknownFormatError, get_format
from plugins.kernels.hardware import WARP_SIZE, Capability, hardware_of
from plugins.kernels.spec import Constant, KernelSpec, Launch, Pointer, Scalar
from plugins.token_quantize.reference import ContainerError, number_factor, number_type

FLOATS: Mapping[str, int] = MappingProxyType(
    {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
)
"""Types of the tensors that are quantized."""

MAX_K = 16384
"""The longest row that fits the registers of a program."""

_ELEMENTS_PER_THREAD = (8, 16, 32)
"""Tactics: 16 bytes of 16-bit floats a load, or more bytes in flight and fewer warps to wait for."""
_MAX_WARPS = 16

Own = TypeVar("Own", bound="QuantizerVariant")


class RowLengthError(ValueError):
    """Tokens longer than a kernel holds."""


@dataclass(frozen=True)
class QuantizerVariant:
    """<Name>_<format>_<container>_<float>_k<K>[_shared]: numbers [..., K] and scales f32 [..., 1] of `float_type`s.

    Numbers are the values times `number_factor`: in ``int8`` INT8, in ``fp8`` FLOAT8E4M3FN, in ``fp16`` E4M3 bytes in
    an INT8 tensor, since GPUs that multiply E4M3 as FP16 have no type for it.

    Raises UnknownFormatError for a name that is none, ContainerError for a container that does not hold the format,
    RowLengthError for a K that is not 1 … MAX_K.
    """

    format: str
    container: str
    float_type: str
    k: int

    NAME: ClassVar[str] = ""
    SOURCE: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.format not in ACTIVATION_FORMATS:
            get_format(self.format)
            raise UnknownFormatError(f"{self.format!r} is no activation format; valid: {', '.join(ACTIVATION_FORMATS)}")
        if self.float_type not in FLOATS:
            close = difflib.get_close_matches(self.float_type, FLOATS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(FLOATS)}"
            raise UnknownFormatError(f"unknown float type {self.float_type!r}; {hint}")
        if not 1 <= self.k <= MAX_K:
            raise RowLengthError(f"{self.NAME} has kernels for tokens of 1 to {MAX_K} numbers, not {self.k}")
        number_factor(self.number_format, self.container)

    @property
    def number_format(self) -> Format:
        """The format that x is rounded to."""
        return get_format(self.format)

    @property
    def op_type(self) -> str:
        """Node type."""
        return f"{self.NAME}_{self.format}_{self.container}_{self.float_type}_k{self.k}"

    @classmethod
    def parse(cls: type[Own], op_type: str) -> Own | None:
        """The variant of that name, None if it is another operator's. Raises as the class."""
        match = re.fullmatch(rf"{cls.NAME}_([a-z0-9]+)_([a-z0-9]+)_([a-z0-9]+)_k([1-9]\d*)(_shared)?", op_type)
        flags = {"shared"} & {field.name for field in fields(cls)}
        if match is None or (match[5] and not flags):
            return None
        return cls(match[1], match[2], match[3], int(match[4]), **dict.fromkeys(flags, match[5] is not None))

    @property
    def input_types(self) -> Mapping[str, int]:
        """ONNX element types by input name, in order."""
        return {"x": FLOATS[self.float_type]}

    @property
    def output_types(self) -> Mapping[str, int]:
        """ONNX element types by output name."""
        numbers = TensorProto.INT8 if self.container == FP16.name else number_type(self.container).onnx_type
        return {"numbers": numbers, "scales": TensorProto.FLOAT}

    @property
    def output_widths(self) -> tuple[int, int]:
        """The last dimension of each output; the others are x's."""
        return self.k, 1

    @property
    def input_names(self) -> tuple[str, ...]:
        """Inputs in order."""
        return tuple(self.input_types)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Outputs in order."""
        return tuple(self.output_types)

    def attributes(self, layer: str) -> dict[str, AttributeValue]:
        """All attributes of a node that serves `layer` (a module path); what the operator does is in its name."""
        return {"layer": layer, **plugin_attributes()}

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        """The kernel's integers."""
        return ("rows",)

    @property
    def constants(self) -> Mapping[str, Constant]:
        """Constants that this operator's kernel has beside the quantizer's."""
        return {}

    def kernels(self, capability: Capability) -> tuple[KernelSpec, ...]:
        """One kernel per tactic for GPUs of a compute capability, the best default first: a row a program each.

        Raises UnknownCapabilityError, and ContainerError for "fp8" where there is no E4M3.
        """
        hardware = hardware_of(capability)
        if self.container == FP8.name and not hardware.has_fp8:
            label = "{}.{}".format(*capability)
            raise ContainerError(f"{self.op_type}: compute capability {label} has no fp8; nearest container: fp16")
        fmt, container = self.number_format, number_type(self.container)
        factor = number_factor(fmt, self.container)
        constants = {
            **self.constants,
            "K": self.k,
            "MAX": fmt.max,
            "FACTOR": factor,
            "MANTISSA_BITS": fmt.mantissa_bits,
            "STEP": fmt.step * factor,
            "UNIFORM": fmt.is_uniform,
            "CONTAINER": container.name,
            "WIDE": self.float_type != "fp16",
            "FUSED": True,
            "CONVERTS": hardware.has_fp8 and not container.is_integer,
        }
        return tuple(
            KernelSpec(
                name=f"{self.op_type}_{hardware.label}_t{tactic}",
                source=self.SOURCE,
                inputs=tuple(Pointer(name, self.float_type) for name in self.input_types),
                scalars=self.scalars,
                # E4M3 is stored as bytes, too.
                outputs=(Pointer("numbers", "i8"), Pointer("scales", "fp32")),
                constants=constants,
                launch=Launch(rows_per_program=1, columns=1, num_warps=num_warps),
            )
            for tactic, num_warps in enumerate(_num_warps(self.k))
        )


def _num_warps(k: int) -> tuple[int, ...]:
    """Distinct counts of warps that leave each thread about `_ELEMENTS_PER_THREAD` of a row."""
    widest = 1 << (k.bit_length() - 1)
    counts = [widest // (WARP_SIZE * elements) for elements in _ELEMENTS_PER_THREAD]
    return tuple(dict.fromkeys(min(max(count, 1), _MAX_WARPS) for count in counts))
