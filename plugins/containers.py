"""Exact containers: hardware number types in which the values of a smaller format lose nothing.

Every finite value of a format is an integer NUMERATOR times the format's step. Where all numerators, times a power
of two, are numbers of a hardware type, a product of two formats is exact there, and so is its sum as long as the
accumulator is wide enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from plugins.formats import FORMATS, FloatFormat, Format

MAX_MULTIPLIER = np.iinfo(np.uint8).max
"""Group multipliers are one byte each."""


@dataclass(frozen=True)
class Container:
    """A hardware number type.

    `dtype` and `onnx_type` name it in numpy and ONNX. `max_magnitude` is its largest number (INT8: 127, so that a
    number and its negative both fit), `smallest` its smallest positive one. `accumulator_limit` is the largest
    integer up to which every integer is exact in its accumulator (INT32, or FP32's significand).
    """

    name: str
    dtype: np.dtype[Any]
    onnx_type: int
    max_magnitude: float
    smallest: float
    accumulator_limit: int

    @property
    def is_integer(self) -> bool:
        """True for INT8 and INT4, whose numbers are numerators; floats hold values."""
        return self.smallest == 1.0

    def holds(self, numbers: npt.NDArray[np.float64]) -> bool:
        """True if every number is exactly one of the container's."""
        if float(np.abs(numbers).max()) > self.max_magnitude:
            return False
        return bool(np.array_equal(numbers.astype(self.dtype).astype(np.float64), numbers))


_E4M3 = FORMATS["e4m3"]
_HALF, _SINGLE = np.finfo(np.float16), np.finfo(np.float32)
_FP32_INTEGERS = 2 ** (_SINGLE.nmant + 1)

INT8 = Container("int8", np.dtype(np.int8), TensorProto.INT8, float(np.iinfo(np.int8).max), 1.0, 2**31 - 1)
# Weights only: they are decoded before they are multiplied, and sums are FP32's.
INT4 = Container("int4", np.dtype(ml_dtypes.int4), TensorProto.INT4, FORMATS["int4"].max, 1.0, _FP32_INTEGERS)
FP8 = Container(
    "fp8", np.dtype(ml_dtypes.float8_e4m3fn), TensorProto.FLOAT8E4M3FN, _E4M3.max, _E4M3.step, _FP32_INTEGERS
)
FP16 = Container(
    "fp16",
    np.dtype(np.float16),
    TensorProto.FLOAT16,
    float(_HALF.max),
    float(_HALF.smallest_subnormal),
    _FP32_INTEGERS,
)
FP32 = Container(
    "fp32",
    np.dtype(np.float32),
    TensorProto.FLOAT,
    float(_SINGLE.max),
    float(_SINGLE.smallest_subnormal),
    _FP32_INTEGERS,
)

CONTAINERS: Mapping[str, Container] = MappingProxyType({entry.name: entry for entry in (INT8, INT4, FP8, FP16, FP32)})
"""Every container by name."""


@cache
def fits(fmt: Format, container: Container) -> bool:
    """True if all values of the format, times one power of two, are numbers of the container."""
    return factor(fmt, container) is not None


@cache
def factor(fmt: Format, container: Container, max_multiplier: int = 1) -> float | None:
    """The power of two by which values enter the container, None if no power of two makes them fit.

    INT8: 1/step, which turns values into numerators. Floats: 1 where the values fit as they are, otherwise the
    nearest power of two with which they do. With `max_multiplier` the values times every group multiplier of
    `multipliers(fmt, container)` up to it must fit.
    """
    largest = fmt.max * max_multiplier
    allowed = [m for m in multipliers(fmt, container) if m <= max_multiplier] if max_multiplier > 1 else [1]
    if container.is_integer:
        powers = [-_exponent(fmt.step)]
    else:
        lowest = _exponent(container.smallest) - _exponent(fmt.step)
        highest = _exponent(container.max_magnitude) - _exponent(largest)
        powers = sorted(range(lowest, highest + 1), key=lambda power: (abs(power), power))
    values = fmt.values[fmt.valid].astype(np.float64)
    for power in powers:
        if all(container.holds(values * (m * 2.0**power)) for m in allowed):
            return float(2.0**power)
    return None


@cache
def multipliers(fmt: Format, container: Container) -> tuple[int, ...]:
    """The integers m ≤ MAX_MULTIPLIER with which every value times m still is exact in the container.

    For INT8 these are 1 … 127 // max_numerator; in a float container the significand of m must leave room for the
    format's own, so E2M1 in E4M3 has 1, 1.25 and 1.5 times powers of two. Empty if the format does not fit.
    """
    if not fits(fmt, container):
        return ()
    # The container's finest grid: a numerator that is exact there stays exact at every coarser power of two that
    # does not overflow, which `factor` finds.
    numerators = fmt.values[fmt.valid].astype(np.float64) / fmt.step * container.smallest
    return tuple(m for m in range(1, MAX_MULTIPLIER + 1) if container.holds(numerators * m))


def rounds_alike(fmt: Format, container: Container) -> bool:
    """True for formats with E4M3's mantissa in FP8: converting a scaled number to E4M3 rounds it as the format does."""
    return container == FP8 and isinstance(fmt, FloatFormat) and fmt.mantissa_bits == _E4M3.mantissa_bits


def activation_factor(fmt: Format, container: Container) -> float | None:
    """The power of two by which activations enter the container, None if no power of two makes them fit.

    `factor`'s, but a format that E4M3 rounds alike enters FP8 at the bottom: its smallest normal value becomes E4M3's.
    """
    if rounds_alike(fmt, container):
        return _E4M3.min_normal / fmt.min_normal
    return factor(fmt, container)


def _exponent(number: float) -> int:
    """floor(log2(number)), exactly."""
    return int(np.frexp(number)[1]) - 1
