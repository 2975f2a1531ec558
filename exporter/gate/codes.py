"""Quantized activations compared bit for bit, and the differences that rounding boundaries explain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from exporter.passes.encodings import unit_of
from plugins.containers import FP8
from plugins.formats import Format

Floats: TypeAlias = npt.NDArray[np.float32]

# A quotient this close to a rounding boundary may legitimately fall on either side of it: a division, and a product
# with a reciprocal instead, differ by less.
BOUNDARY_ULPS = 4
LARGEST_MISMATCH_FRACTION = 1e-4


def encode_values(values: Floats, fmt: Format, encoding: str) -> npt.NDArray[np.generic]:
    """The tensor that a graph gives for these values of `fmt`; the inverse of `exporter.passes.encodings.decode`.

    FP8 is given as bytes, as ONNX Runtime returns it, or as signed bytes ("fp8_bytes"). Raises ValueError for an
    unknown encoding.
    """
    if encoding == "float32":
        return values
    if encoding in ("fp8", "fp8_bytes"):
        numbers = (values.astype(np.float64) / unit_of(fmt, "fp8")).astype(np.float32)
        return numbers.astype(FP8.dtype).view(np.uint8 if encoding == "fp8" else np.int8)
    numerators = np.rint(values.astype(np.float64) / fmt.step).astype(np.int64)
    if encoding == "uint8":
        return (numerators - fmt.min_numerator).astype(np.uint8)
    if encoding == "int8":
        return numerators.astype(np.int8)
    raise ValueError(f"unknown encoding {encoding!r}")


@dataclass(frozen=True)
class CodeComparison:
    """How many codes differ, how many of those a rounding boundary explains, and where the first other one is."""

    mismatches: int
    explained: int
    count: int
    rows_agree: npt.NDArray[np.bool_]
    first_unexplained: str = ""

    @property
    def failure(self) -> str:
        """What is wrong with the codes, empty when nothing is."""
        if self.mismatches > self.explained:
            unexplained = self.mismatches - self.explained
            return f"{unexplained} of {self.count} codes differ away from rounding boundaries, {self.first_unexplained}"
        # At least one is allowed, so that a small layer is not held to zero.
        allowed = max(1, int(self.count * LARGEST_MISMATCH_FRACTION))
        if self.mismatches > allowed:
            return f"{self.mismatches} of {self.count} codes differ at rounding boundaries, at most {allowed} may"
        return ""


def compare_codes(x: Floats, scales: Floats, expected: Floats, found: Floats, fmt: Format) -> CodeComparison:
    """Compare quantized values [R, K] with the reference's, given the input x [R, K] and its scales [R, G].

    A difference is explained when both values are neighbours in the format and x / scale (float32) lies within
    BOUNDARY_ULPS of the point half way between them. The sign of a zero does not count.
    """
    differs = expected != found
    rows_agree = ~differs.any(axis=-1)
    if rows_agree.all():
        return CodeComparison(0, 0, expected.size, rows_agree)
    rows, columns = np.nonzero(differs)
    wanted, got = expected[rows, columns].astype(np.float64), found[rows, columns].astype(np.float64)
    with np.errstate(divide="ignore"):
        quotient = x[rows, columns] / scales[rows, columns * scales.shape[1] // x.shape[1]]
    grid = np.unique(fmt.values[fmt.valid].astype(np.float64))
    neighbours = np.isin(got, grid) & (np.abs(np.searchsorted(grid, wanted) - np.searchsorted(grid, got)) == 1)
    boundary = (wanted + got) / 2
    ulp = np.spacing(np.abs(boundary).astype(np.float32)).astype(np.float64)
    explained = neighbours & (np.abs(quotient.astype(np.float64) - boundary) <= BOUNDARY_ULPS * ulp)
    first = ""
    if not explained.all():
        index = int(np.argmin(explained))
        place = f"row {rows[index]}, channel {columns[index]}"
        first = f"the first at {place}: {got[index]:g} instead of {wanted[index]:g}"
    return CodeComparison(len(rows), int(explained.sum()), expected.size, rows_agree, first)
