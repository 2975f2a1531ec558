"""What the quantizers compute, in numpy, float32 throughout."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from plugins.formats import Format, Values

TINY = 2.0**-100
"""Smallest amax: a token of zeros keeps a positive scale, and amax/max stays a normal float32."""


def quantize(x: Values, scales: Values, fmt: Format) -> Values:
    """Grid values float32 [...]: the format's rounding of x / scales, a true division; every zero is +0.

    Codes keep the sign of zero, operators do not: integers in hardware have none, and runtimes disagree about it.
    """
    rounded: Values = fmt.round(np.divide(x, scales, dtype=np.float32)) + np.float32(0)
    return rounded


def quantize_online(x: Values, fmt: Format) -> tuple[Values, Values]:
    """Grid values float32 [..., K] and scales float32 [..., 1], one scale per token (all but the last axis).

    scales = max(amax, TINY) / fmt.max, so that the largest magnitude of a token lands on the largest value; of an
    unsigned format negative numbers count as 0.
    """
    held = x if fmt.min else np.maximum(x, np.float32(0))
    amax: npt.NDArray[np.float32] = np.abs(held).max(axis=-1, keepdims=True)
    scales = np.divide(np.maximum(amax, np.float32(TINY)), np.float32(fmt.max), dtype=np.float32)
    return quantize(held, scales, fmt), scales
