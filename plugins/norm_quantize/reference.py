"""Layer normalization with modulation and its quantization, in numpy, float32 throughout."""

from __future__ import annotations

import numpy as np

from plugins.formats import Format, Values
from plugins.token_quantize.reference import Numbers, quantize_tokens

EPSILON = 1e-6


def modulated_norm(x: Values, scale: Values, shift: Values) -> Values:
    """(x - mean) / √(variance + EPSILON) · scale + shift over the last axis of x [B, T, K].

    scale and shift are [B or 1, 1, K]. The variance is the mean square of the differences from the mean, which loses
    nothing when the mean is large.
    """
    centered = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(centered).mean(axis=-1, keepdims=True)
    normalized = centered * (np.float32(1) / np.sqrt(variance + np.float32(EPSILON)))
    result: Values = normalized * scale + shift
    return result


def norm_quantize(x: Values, scale: Values, shift: Values, fmt: Format, container: str) -> tuple[Numbers, Values]:
    """Container numbers [B, T, K] and scales float32 [B, T, 1], as `quantize_tokens` gives them."""
    return quantize_tokens(modulated_norm(x, scale, shift), fmt, container)
