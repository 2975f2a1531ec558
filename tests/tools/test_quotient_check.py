"""The exhaustive check of the kernels' quotient, on a part of its scales."""

from __future__ import annotations

import shutil

import pytest

from tools.quotient_check import Count, count

pytestmark = pytest.mark.skipif(
    not (shutil.which("gcc") or shutil.which("clang")), reason="the check is C, and no compiler is here"
)


def test_no_quotient_of_the_first_scales_differs() -> None:
    assert count(0, 2**12) == Count(2**12 * 128 * 5, 0)


def test_the_reciprocal_alone_differs() -> None:
    """So the count can fail."""
    assert count(0, 2**12, alone=True).differing > 1000
