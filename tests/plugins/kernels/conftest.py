"""Kernels that are compiled once for all tests here."""

from __future__ import annotations

import pytest

from plugins.kernels.compile import compile_library
from plugins.kernels.hardware import HARDWARE
from plugins.kernels.library import KernelLibrary
from tests.plugins.kernels.samples import ScaleRows


@pytest.fixture(scope="package")
def library() -> KernelLibrary:
    """Two tactics of one operator for every GPU."""
    return compile_library([ScaleRows()], tuple(HARDWARE))
