"""Rounding to the nearest entry of a table of values: what floats and integers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Codes: TypeAlias = npt.NDArray[np.uint8]
Values: TypeAlias = npt.NDArray[np.float32]


class NotRepresentableError(ValueError):
    """A value or a code that the format has no meaning for."""


class CodeTable(ABC):
    """A format seen as its table: codes in, values out, and rounding to the nearest entry, ties to the even code."""

    name: str

    @property
    @abstractmethod
    def bits(self) -> int:
        """Width of a code."""

    @property
    @abstractmethod
    def max(self) -> float:
        """Largest finite value."""

    @property
    @abstractmethod
    def min(self) -> float:
        """Smallest finite value: 0 where there is no sign."""

    @property
    @abstractmethod
    def step(self) -> float:
        """The unit: every finite value is an integer multiple of it, and it is itself a value."""

    @property
    @abstractmethod
    def values(self) -> Values:
        """Decode table, float32 [2**bits], read-only."""

    @property
    @abstractmethod
    def magnitudes(self) -> Values:
        """The non-negative finite values in ascending order: entry i belongs to code i."""

    @abstractmethod
    def with_sign(self, magnitude_codes: npt.NDArray[np.intp], negative: npt.NDArray[np.bool_]) -> Codes:
        """Codes from magnitude codes and signs."""

    @property
    def nan_code(self) -> int | None:
        """The code that NaN is encoded to, None where the format has no NaN."""
        return None

    @cached_property
    def _midpoints(self) -> Values:
        exact = self.magnitudes.astype(np.float64)
        return ((exact[:-1] + exact[1:]) / 2).astype(np.float32)

    @cached_property
    def valid(self) -> npt.NDArray[np.bool_]:
        """bool [2**bits]: the codes that `encode` gives for finite values."""
        return read_only(np.isfinite(self.values) & (np.abs(self.values) <= self.max))

    @cached_property
    def max_numerator(self) -> int:
        """`max` in units of `step`."""
        return round(self.max / self.step)

    @property
    def min_numerator(self) -> int:
        """`min` in units of `step`."""
        return round(self.min / self.step)

    @cached_property
    def numerators(self) -> npt.NDArray[np.int64]:
        """int64 [2**bits]: value/step of every valid code; 0 where `valid` is False.

        Raises NotRepresentableError for a format whose range is wider than an int64.
        """
        if self.max_numerator > np.iinfo(np.int64).max:
            raise NotRepresentableError(f"{self.name}: {self.max}/{self.step} does not fit a 64-bit integer")
        finite = np.where(self.valid, self.values, np.float32(0)).astype(np.float64)
        return read_only(np.rint(finite / self.step).astype(np.int64))

    @cached_property
    def is_uniform(self) -> bool:
        """True when neighbouring values are one step apart everywhere (the integers, and E1M2)."""
        return len(self.magnitudes) == self.max_numerator + 1

    def encode(self, values: npt.NDArray[Any]) -> Codes:
        """Codes uint8[...] of the nearest values, ties to the even code; beyond `max`, infinity too, `max`.

        Negative values become 0 where there is no sign. Raises NotRepresentableError for NaN where the format has none,
        and for negative values where it has no 0 either.
        """
        array = np.asarray(values)
        if array.dtype != np.float32:
            array = array.astype(np.float64)
        # Between two midpoints both searches agree; on a midpoint `upper` is `lower` + 1 and one of them is even.
        lower = np.searchsorted(self._midpoints, np.abs(array), side="left")
        upper = np.searchsorted(self._midpoints, np.abs(array), side="right")
        is_nan = np.isnan(array)
        codes = self.with_sign(np.where(lower % 2 == 0, lower, upper), np.signbit(array) & ~is_nan)
        if not is_nan.any():
            return codes
        if self.nan_code is None:
            raise NotRepresentableError(f"{self.name} has no NaN, and {int(is_nan.sum())} of the values are NaN")
        return np.where(is_nan, np.uint8(self.nan_code), codes)

    def decode(self, codes: npt.NDArray[Any]) -> Values:
        """Values float32[...] of the codes. Raises NotRepresentableError for codes of 2**bits and more."""
        array = np.asarray(codes)
        if array.dtype.kind not in "ui":
            raise NotRepresentableError(f"{self.name}: codes must be unsigned integers, not {array.dtype}")
        if array.size and (int(array.min()) < 0 or int(array.max()) >= 1 << self.bits):
            found = f"{int(array.min())}…{int(array.max())}"
            raise NotRepresentableError(f"{self.name}: codes must lie in 0…{(1 << self.bits) - 1}, got {found}")
        return np.asarray(self.values[array])

    def round(self, values: npt.NDArray[Any]) -> Values:
        """The nearest values of the format, float32[...]: decode(encode(values))."""
        return self.decode(self.encode(values))


def read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same array, write-protected: tables are shared."""
    array.setflags(write=False)
    return array
