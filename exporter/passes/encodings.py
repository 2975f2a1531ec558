"""How a container's numbers stand for a format's values: value = number × unit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from plugins.containers import FP8, factor
from plugins.formats import FORMATS, FloatFormat, Format

ENCODINGS = ("float32", "uint8", "int8", "fp8")

_E4M3 = FORMATS["e4m3"]


def rounds_in_fp8(fmt: Format) -> bool:
    """True for formats with E4M3's mantissa: a conversion to E4M3 of a scaled number rounds it as the format does."""
    return isinstance(fmt, FloatFormat) and isinstance(_E4M3, FloatFormat) and fmt.mantissa_bits == _E4M3.mantissa_bits


def unit_of(fmt: Format, container: str) -> float:
    """The power of two by which a number of the container is multiplied to get the format's value.

    int8 holds numerators. fp8 holds the values themselves, or a power of two of them: formats that E4M3 rounds like
    lie at its bottom, so that their smallest normal number is its smallest normal number. fp32 holds values.
    """
    if container == "int8":
        return fmt.step
    if container != "fp8":
        return 1.0
    if isinstance(fmt, FloatFormat) and isinstance(_E4M3, FloatFormat) and rounds_in_fp8(fmt):
        return fmt.min_normal / _E4M3.min_normal
    into = factor(fmt, FP8)
    if into is None:
        raise ValueError(f"{fmt.name} values do not fit fp8")
    return 1 / into


def decode(raw: npt.NDArray[Any], fmt: Format, encoding: str) -> npt.NDArray[np.float32]:
    """The values, float32, of a tensor of quantized activations in one of the `ENCODINGS`.

    uint8 has the format's largest numerator as its zero point. fp8 is taken as bytes or as ml_dtypes' E4M3.
    """
    unit, zero = np.float32(1), np.float32(0)
    if encoding == "uint8":
        unit, zero = np.float32(fmt.step), np.float32(fmt.max_numerator)
    elif encoding == "int8":
        unit = np.float32(fmt.step)
    elif encoding == "fp8":
        raw, unit = raw.view(ml_dtypes.float8_e4m3fn), np.float32(unit_of(fmt, "fp8"))
    elif encoding != "float32":
        raise ValueError(f"unknown encoding {encoding!r}; valid: {', '.join(ENCODINGS)}")
    values: npt.NDArray[np.float32] = (raw.astype(np.float32) - zero) * unit
    return values
