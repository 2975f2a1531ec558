"""How a container's numbers stand for a format's values: value = number × unit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from plugins.containers import CONTAINERS, activation_factor
from plugins.formats import Format

ENCODINGS = ("float32", "uint8", "int8", "fp8", "fp8_bytes")


def unit_of(fmt: Format, container: str) -> float:
    """The power of two by which a number of the container is multiplied to get the format's value.

    The types of block scaling hold values. Raises ValueError where the container does not hold the format.
    """
    if container not in CONTAINERS:
        return 1.0
    into = activation_factor(fmt, CONTAINERS[container])
    if into is None:
        raise ValueError(f"{fmt.name} values do not fit {container}")
    return 1 / into


def decode(raw: npt.NDArray[Any], fmt: Format, encoding: str) -> npt.NDArray[np.float32]:
    """The values, float32, of a tensor of quantized activations in one of the `ENCODINGS`.

    uint8 has a zero point, the numerators that lie below 0. fp8 is taken as bytes or as ml_dtypes' E4M3,
    fp8_bytes is that in INT8 tensors.
    """
    unit, zero = np.float32(1), np.float32(0)
    if encoding == "uint8":
        unit, zero = np.float32(fmt.step), np.float32(-fmt.min_numerator)
    elif encoding == "int8":
        unit = np.float32(fmt.step)
    elif encoding in ("fp8", "fp8_bytes"):
        raw, unit = raw.view(ml_dtypes.float8_e4m3fn), np.float32(unit_of(fmt, "fp8"))
    elif encoding != "float32":
        raise ValueError(f"unknown encoding {encoding!r}; valid: {', '.join(ENCODINGS)}")
    values: npt.NDArray[np.float32] = (raw.astype(np.float32) - zero) * unit
    return values
