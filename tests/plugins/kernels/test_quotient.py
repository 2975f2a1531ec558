"""The two operations that stand for a division in the quantizers' kernels round as the division does.

A quantizer sees of x / scale, rounded to float32, only on which side of a midpoint of its grid it lies, or whether it
is one. Midpoints of all grids are whole numbers of halves up to 127, times powers of two, which change nothing here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

Floats = npt.NDArray[np.float32]

HALVES = np.arange(1, 256, 2, dtype=np.float32) / 2


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """a·b + c rounded once: through the exact sum, a float64 and its error, rounded to an odd float64."""
    product = a.astype(np.float64) * b.astype(np.float64)
    wide = c.astype(np.float64)
    total = product + wide
    part = total - product
    error = (product - (total - part)) + (wide - part)
    # Round to odd: a float64 that is not exact never looks like a midpoint of float32.
    even = total.view(np.int64) % 2 == 0
    toward = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where((error != 0) & even, total.view(np.int64) + toward, total.view(np.int64))
    return odd.view(np.float64).astype(np.float32)


def sides(quotients: Floats) -> npt.NDArray[np.int8]:
    return np.sign(quotients - HALVES).astype(np.int8)


def differing(significands: npt.NDArray[np.int64]) -> int:
    """Scales 1 + s·2^-23, every midpoint, and the five float32 next to where the quotient is the midpoint."""
    scale = (1 + significands * 2.0**-23).astype(np.float32)[:, None]
    reciprocal = np.float32(1) / scale
    rest = fma(-reciprocal, scale, np.float32(1)) / scale
    x = scale * HALVES
    count = 0
    for away in range(-2, 3):
        near = (x.view(np.int32) + np.int32(away)).view(np.float32)
        fused = fma(near, np.broadcast_to(reciprocal, near.shape), near * rest)
        count += np.count_nonzero(sides(fused) != sides(near / scale))
    return count


@pytest.mark.parametrize("start", [0, 2**23 - 2**12])
def test_the_first_and_the_last_scales_of_a_binade(start: int) -> None:
    assert differing(np.arange(start, start + 2**12)) == 0


def test_scales_whose_quotients_come_nearest() -> None:
    """Where a rounding of the quotient begins, x is near N·scale/2 ± scale/2^25: nearest for scales near multiples of
    2^-9, which leave almost nothing."""
    multiples = np.arange(2**8, 2**9) * 2**14 - 2**22
    near = (multiples[:, None] + np.arange(-16, 17)).ravel()
    assert differing(near[(near >= 0) & (near < 2**23)]) == 0


def test_random_scales() -> None:
    assert differing(np.random.default_rng(0).integers(0, 2**23, 10_000)) == 0


def test_the_reciprocal_alone_would_not_do() -> None:
    scale = (1 + np.arange(1000) * 2.0**-23).astype(np.float32)[:, None]
    x = scale * HALVES
    assert np.count_nonzero(sides(x * (np.float32(1) / scale)) != sides(x / scale)) > 1000
