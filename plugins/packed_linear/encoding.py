"""What a packed weight is as an operand of a tensor core: element types, units, and the numbers of all fields."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from plugins.formats import FloatFormat, Format
from plugins.packed_linear.layout import Layout


class Element(enum.Enum):
    """A tensor core's operand type, by Triton's name of it."""

    INT8 = "int8"
    FP8 = "fp8e4nv"
    FP16 = "fp16"
    BF16 = "bf16"

    @property
    def bits(self) -> int:
        """Width."""
        return 8 if self in (Element.INT8, Element.FP8) else 16


SIGNIFICAND_BITS: Mapping[Element, int] = MappingProxyType({Element.FP8: 3, Element.FP16: 10, Element.BF16: 7})
_SMALLEST: Mapping[Element, int] = MappingProxyType({Element.FP8: -9, Element.FP16: -24, Element.BF16: -133})
"""log2 of the smallest subnormal, which is what the code 1 stands for."""
_LARGEST_LIFT = 127


@dataclass(frozen=True)
class Encoding:
    """Weights of a format in an operand of a type.

    A decoded number is `unit` times the weight's numerator (value / step). Float operands hold a format's bits at the
    bottom of their own range, subnormals included, where they are a power of two times the value.
    """

    fmt: Format
    element: Element

    @property
    def twos_complement(self) -> bool:
        """Whether fields are two's complement: in INT8 that is as good as decoded for evenly spaced values."""
        return self.element is Element.INT8 and self.fmt.is_uniform

    @property
    def exponent_bits(self) -> int:
        """INT4's magnitudes are E1M2's: evenly spaced, 0 to 7."""
        return self.fmt.exponent_bits if isinstance(self.fmt, FloatFormat) else 1

    @property
    def mantissa_bits(self) -> int:
        """Bits of the magnitude below the exponent."""
        return self.fmt.bits - 1 - self.exponent_bits

    @property
    def octet_shift(self) -> int:
        """Where an octet on its way has the magnitude's lowest bit."""
        if self.element is Element.INT8:
            return 0
        width = SIGNIFICAND_BITS[Element.FP8] if self.element is Element.FP8 else SIGNIFICAND_BITS[Element.FP16] - 8
        return max(width - self.mantissa_bits, 0)

    @property
    def lift(self) -> int:
        """log2 of what decoded bits are multiplied by, which makes BF16 numbers the values themselves if that fits."""
        if self.element is not Element.BF16:
            return 0
        return min(int(np.log2(self.fmt.step)) - self._bits_exponent, _LARGEST_LIFT)

    @property
    def _bits_exponent(self) -> int:
        return _SMALLEST[self.element] + SIGNIFICAND_BITS[self.element] - self.mantissa_bits

    @property
    def unit(self) -> float:
        """The decoded number of numerator 1, a power of two."""
        if self.element is Element.INT8:
            # Two's complement fields are decoded in the upper bits of their byte.
            return float(2 ** (self.element.bits - self.fmt.bits)) if self.twos_complement else 1.0
        return float(2.0 ** (self._bits_exponent + self.lift))

    @property
    def factor(self) -> float:
        """What a sum of decoded numbers is multiplied by to be one of numerators (INT8) or of values (floats)."""
        return (1.0 if self.element is Element.INT8 else self.fmt.step) / self.unit

    @cached_property
    def numbers(self) -> npt.NDArray[np.float64]:
        """The decoded number of every stored field, float64 [2**bits]. The field of -0 counts as 0."""
        fields = np.arange(2**self.fmt.bits)
        if self.twos_complement:
            return np.asarray(self.unit * ((fields ^ 8) - 8), np.float64)
        numerators = self.fmt.magnitudes.astype(np.float64)[fields >> 1] / self.fmt.step
        return np.asarray(self.unit * np.where(fields & 1, -numerators, numerators), np.float64)

    def layout(self, count: int, group_size: int) -> Layout:
        """The packed rows of a weight [N, count]."""
        return Layout(self.fmt, count, group_size, self.twos_complement)
