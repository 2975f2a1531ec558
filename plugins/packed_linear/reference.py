"""What the packed linear computes, in numpy: exact sums, then float32 operations that each round once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from plugins.formats import Values

if TYPE_CHECKING:
    from plugins.packed_linear.descriptor import PackedLinear

SQRT_8_OVER_PI = 1.5957691216057308
GELU_CUBIC = 0.044715
DTYPES: Mapping[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


def packed_linear(variant: PackedLinear, inputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """y [..., N] from the operator's inputs by name.

    The sum over K is exact, then rounded to float32; tensor cores' FP32 sums deviate from it by their own roundings.
    """
    value = _sums(variant, inputs).astype(np.float32)
    if variant.is_quantized:
        value = value * inputs["x_scales"]
    if variant.group_factors != "scales":
        value = value * inputs["weight_scales"].T
    if variant.has_bias:
        value = value + inputs["bias"]
    if variant.has_gelu:
        value = gelu(value)
    if variant.has_residual:
        gated: Values = value * inputs["gate"].astype(np.float32)
        value = gated + inputs["residual"].astype(np.float32)
    return value.astype(DTYPES[variant.float_type])


def gelu(value: Values) -> Values:
    """x/2·(1 + tanh(√(2/π)·(x + 0.044715 x³))), as x·sigmoid(2·…), float32."""
    cubic = np.float32(GELU_CUBIC) * value * value * value
    with np.errstate(over="ignore"):  # the exponential of a large number is infinite, and the quotient 0
        return np.asarray(value / (np.float32(1) + np.exp(np.float32(-SQRT_8_OVER_PI) * (value + cubic))))


def weights(variant: PackedLinear, words: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """float64 [N, K]: numerators for INT8, values for floats."""
    values = variant.format.decode(variant.layout.unpack(words)).astype(np.float64)
    return values / variant.format.step if variant.container == "int8" else values


def activations(variant: PackedLinear, inputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
    """The numbers that are multiplied, float64 [..., K]."""
    x = inputs[variant.input_names[0]]
    return np.asarray((x.view(ml_dtypes.float8_e4m3fn) if variant.container == "fp16" else x).astype(np.float64))


def _sums(variant: PackedLinear, inputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
    weight = weights(variant, inputs["words"])
    if variant.group_factors:
        factors = inputs["multipliers" if variant.group_factors == "multipliers" else "weight_scales"]
        weight = weight * np.repeat(factors.astype(np.float64), variant.group_size, axis=1)
    return np.asarray(activations(variant, inputs) @ weight.T)
