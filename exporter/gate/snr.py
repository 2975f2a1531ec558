"""Signal-to-noise ratios in decibels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt


def snr_db(signal: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """10·log10(Σ signal² / Σ (signal − other)²), summed in float64.

    Infinite where they are equal, minus infinite for a silent signal that differs, NaN where one is not finite.
    """
    exact = signal.astype(np.float64)
    return power_ratio_db(float(np.sum(exact**2)), float(np.sum((exact - other) ** 2)))


def power_ratio_db(signal: float, noise: float) -> float:
    """10·log10(signal / noise) of two powers; see `snr_db` for zeros."""
    if math.isnan(signal) or math.isnan(noise) or math.isinf(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
