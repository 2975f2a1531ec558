"""What the token quantizer computes, in numpy."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from plugins.containers import CONTAINERS, FP8, FP16, INT8, Container, activation_factor
from plugins.float_quantize.reference import quantize_online
from plugins.formats import Format, Values

Numbers: TypeAlias = npt.NDArray[Any]


class ContainerError(ValueError):
    """A container that activations of a format do not fit."""


def number_type(container: str) -> Container:
    """The type of a container's numbers: E4M3 in "fp16", too, whose GPUs decode its bytes to FP16."""
    return FP8 if container == FP16.name else CONTAINERS[container]


def number_factor(fmt: Format, container: str) -> float:
    """The power of two by which values enter the container. Raises ContainerError, which names one that does fit.

    The kernels scale by magnitudes, so they have no unsigned formats.
    """
    if fmt.min == 0:
        raise ContainerError(f"{fmt.name} has no sign, and kernels quantize to signed formats only; nearest: e2m3")
    if container not in (INT8.name, FP8.name, FP16.name):
        raise ContainerError(f"{container!r} is no container of activations; valid: int8, fp8, fp16")
    factor = activation_factor(fmt, number_type(container))
    if factor is None:
        other = next((entry.name for entry in (INT8, FP8) if activation_factor(fmt, entry) is not None), "none")
        raise ContainerError(f"{container} does not hold the values of {fmt.name}; nearest that does: {other}")
    return factor


def container_numbers(values: Values, fmt: Format, container: str) -> Numbers:
    """The numbers, in the type that carries them, of values on the format's grid: INT8, E4M3, or E4M3 bytes as INT8."""
    numbers = values * np.float32(number_factor(fmt, container))
    carried: Numbers = numbers.astype(number_type(container).dtype)
    return carried.view(np.int8) if container == FP16.name else carried


def quantize_tokens(x: Values, fmt: Format, container: str) -> tuple[Numbers, Values]:
    """Container numbers [..., K] and scales float32 [..., 1], one scale per token, of x float32 [..., K].

    Scales and rounding are `quantize_online`'s. What has a NaN or an infinity has no numbers: the kernels give such a
    token a scale that is not finite, and so is then everything computed from it.
    """
    values, scales = quantize_online(x, fmt)
    return container_numbers(values, fmt, container), scales
