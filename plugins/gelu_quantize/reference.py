"""Tanh-GELU and its quantization, in numpy, float32 throughout."""

from __future__ import annotations

import numpy as np

from plugins.formats import Format, Values
from plugins.token_quantize.reference import Numbers, quantize_tokens

_LOG2_E = 1.4426950408889634
_SQRT_2_OVER_PI = 0.7978845608028654

LINEAR = -2 * _LOG2_E * _SQRT_2_OVER_PI
CUBIC = LINEAR * 0.044715


def tanh_gelu(x: Values) -> Values:
    """0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), written x / (1 + 2^(x·(LINEAR + CUBIC·x²))).

    So it keeps its precision where tanh is near -1; torch's differs by some 2^-23 of x there.
    """
    with np.errstate(over="ignore"):
        exponent = x * (np.float32(LINEAR) + np.float32(CUBIC) * (x * x))
        result: Values = x / (np.float32(1) + np.exp2(exponent))
    return result


def gelu_quantize(x: Values, fmt: Format, container: str) -> tuple[Numbers, Values]:
    """Container numbers [..., K] of GELU(x) and scales float32 [..., 1], as `quantize_tokens` gives them."""
    return quantize_tokens(tanh_gelu(x), fmt, container)
