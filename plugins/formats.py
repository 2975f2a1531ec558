"""The number formats: a handful of facts each, everything else derived.

A format maps CODES (unsigned integers of `bits` bits) to VALUES (float32). Rounding is part of the contract:
to nearest, ties to the even code, saturating at the smallest and the largest finite value, the sign of zero kept by
floats that have one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from plugins.code_table import Codes, CodeTable, NotRepresentableError, Values, read_only

__all__ = [
    "ACTIVATION_FORMATS",
    "FORMATS",
    "SCALE_ONLY_FORMATS",
    "SIGNED_ACTIVATION_FORMATS",
    "UNSIGNED_ACTIVATION_FORMATS",
    "WEIGHT_FORMATS",
    "CodeTable",
    "Codes",
    "FloatFormat",
    "Format",
    "IntFormat",
    "NotRepresentableError",
    "Specials",
    "UnknownFormatError",
    "Values",
    "get_format",
]

Specials: TypeAlias = Literal["none", "fn", "ieee"]


class UnknownFormatError(ValueError):
    """No format has this name."""


@dataclass(frozen=True)
class FloatFormat(CodeTable):
    """A sign bit unless it is not `signed`, exponent bits and mantissa bits, with subnormals.

    `specials`: "none" every code is finite; "fn" only the largest magnitude code is NaN; "ieee" the largest
    exponent holds infinity and NaN. `has_zero` is False where exponent 0 is an ordinary exponent (E8M0).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    specials: Specials = "none"
    signed: bool = True
    bias_override: int | None = None
    has_zero: bool = True

    @property
    def bits(self) -> int:
        """Width of a code."""
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """Exponent bias: 2^(E-1) - 1 unless overridden."""
        return 2 ** (self.exponent_bits - 1) - 1 if self.bias_override is None else self.bias_override

    @cached_property
    def max(self) -> float:
        """Largest finite value."""
        return float(self.magnitudes[-1])

    @property
    def min(self) -> float:
        """Smallest finite value: 0 where there is no sign, but of E8M0, which has no 0."""
        return -self.max if self.signed else float(self.magnitudes[0])

    @property
    def min_normal(self) -> float:
        """Smallest value with a full significand."""
        return 2.0 ** ((1 if self.has_zero else 0) - self.bias)

    @property
    def step(self) -> float:
        """The smallest subnormal, or the smallest value where there are none."""
        return self.min_normal * 2.0**-self.mantissa_bits

    @cached_property
    def _table(self) -> npt.NDArray[np.float64]:
        codes = np.arange(2 ** (self.exponent_bits + self.mantissa_bits))
        exponents, mantissas = np.divmod(codes, 2**self.mantissa_bits)
        subnormal = (exponents == 0) & self.has_zero
        significands = np.where(subnormal, mantissas, mantissas + 2**self.mantissa_bits).astype(np.float64)
        powers = np.where(subnormal, 1, exponents) - self.bias - self.mantissa_bits
        table: npt.NDArray[np.float64] = np.ldexp(significands, powers)
        if self.specials == "fn":
            table[-1] = np.nan
        elif self.specials == "ieee":
            table[-(2**self.mantissa_bits) :] = np.nan
            table[-(2**self.mantissa_bits)] = np.inf
        return table

    @cached_property
    def magnitudes(self) -> Values:
        return read_only(self._table[np.isfinite(self._table)].astype(np.float32))

    @cached_property
    def values(self) -> Values:
        """Decode table, float32 [2**bits], read-only; NaN and infinities where the format has them."""
        signs = (self._table, -self._table) if self.signed else (self._table,)
        return read_only(np.concatenate(signs).astype(np.float32))

    @property
    def nan_code(self) -> int | None:
        """The positive quiet NaN, None where every code is finite."""
        if self.specials == "none":
            return None
        last = (1 << (self.exponent_bits + self.mantissa_bits)) - 1
        return last if self.specials == "fn" else last - (1 << (self.mantissa_bits - 1)) + 1

    def with_sign(self, magnitude_codes: npt.NDArray[np.intp], negative: npt.NDArray[np.bool_]) -> Codes:
        if not self.signed and self.has_zero:
            return np.where(negative, 0, magnitude_codes).astype(np.uint8)
        if negative.any() and not self.signed:
            raise NotRepresentableError(f"{self.name} is unsigned, and {int(negative.sum())} values are negative")
        return (magnitude_codes + negative * (1 << (self.bits - 1))).astype(np.uint8)


@dataclass(frozen=True)
class IntFormat(CodeTable):
    """Symmetric integers -(2^(b-1) - 1) … 2^(b-1) - 1; codes are two's complement in the low b bits.

    The code of -2^(b-1) decodes to that value but is never encoded to (`valid` is False there).
    """

    name: str
    width: int

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.width

    @property
    def mantissa_bits(self) -> int:
        """The bits beside the sign: an integer is a float that has no exponent."""
        return self.bits - 1

    @property
    def max(self) -> float:
        """Largest value."""
        return float(2 ** (self.bits - 1) - 1)

    @property
    def min(self) -> float:
        """Smallest value."""
        return -self.max

    @property
    def min_normal(self) -> float:
        """Where the step would double if the range went on: every integer lies below."""
        return float(2 ** (self.bits - 1))

    @property
    def step(self) -> float:
        """Integers are one apart."""
        return 1.0

    @cached_property
    def magnitudes(self) -> Values:
        return read_only(np.arange(2 ** (self.bits - 1), dtype=np.float32))

    @cached_property
    def values(self) -> Values:
        """Decode table, float32 [2**bits], read-only."""
        codes = np.arange(2**self.bits)
        return read_only(np.where(codes < 2 ** (self.bits - 1), codes, codes - 2**self.bits).astype(np.float32))

    def with_sign(self, magnitude_codes: npt.NDArray[np.intp], negative: npt.NDArray[np.bool_]) -> Codes:
        signed = np.where(negative, -magnitude_codes, magnitude_codes)
        return np.asarray(signed % (1 << self.bits), np.uint8)


Format: TypeAlias = FloatFormat | IntFormat

_TABLE: tuple[Format, ...] = (
    FloatFormat("e2m0", 2, 0),
    FloatFormat("e2m1", 2, 1),
    FloatFormat("e1m2", 1, 2),
    FloatFormat("e3m0", 3, 0),
    FloatFormat("e2m3", 2, 3),
    FloatFormat("e3m2", 3, 2),
    FloatFormat("e4m3", 4, 3, specials="fn"),
    FloatFormat("e5m2", 5, 2, specials="ieee"),
    FloatFormat("e3m4", 3, 4),
    FloatFormat("e8m0", 8, 0, specials="fn", signed=False, has_zero=False),
    FloatFormat("ue2m4", 2, 4, signed=False),
    FloatFormat("ue2m2", 2, 2, signed=False),
    IntFormat("int3", 3),
    IntFormat("int4", 4),
    IntFormat("int6", 6),
    IntFormat("int8", 8),
)

FORMATS: Mapping[str, Format] = MappingProxyType({entry.name: entry for entry in _TABLE})
"""Every format by name."""

SCALE_ONLY_FORMATS: tuple[str, ...] = ("e8m0",)
# One bit more of mantissa than signed floats of their width, for inputs that are never far below 0.
UNSIGNED_ACTIVATION_FORMATS: tuple[str, ...] = tuple(name for name in FORMATS if FORMATS[name].min == 0)
WEIGHT_FORMATS: tuple[str, ...] = tuple(
    name for name in FORMATS if name not in (*SCALE_ONLY_FORMATS, *UNSIGNED_ACTIVATION_FORMATS)
)
# E3M0 and E2M0 have no mantissa: as activations they would be logarithms, and no rounding body is defined for them.
# Three bits are too few for activations.
SIGNED_ACTIVATION_FORMATS: tuple[str, ...] = tuple(
    name for name in WEIGHT_FORMATS if FORMATS[name].mantissa_bits > 0 and name != "int3"
)
ACTIVATION_FORMATS: tuple[str, ...] = (*SIGNED_ACTIVATION_FORMATS, *UNSIGNED_ACTIVATION_FORMATS)


def get_format(name: str) -> Format:
    """The format called `name`. Raises UnknownFormatError, which names the nearest one."""
    if name in FORMATS:
        return FORMATS[name]
    close = difflib.get_close_matches(name.lower(), FORMATS, n=len(FORMATS))
    # Of the close ones, the one that agrees earliest: 'e2m4' means 'e2m3' rather than 'e3m4'.
    nearest = max(close, key=lambda known: [a == b for a, b in zip(known, name.lower(), strict=False)], default=None)
    hint = f"did you mean {nearest!r}?" if nearest else f"valid: {', '.join(FORMATS)}"
    raise UnknownFormatError(f"unknown format {name!r}; {hint}")
