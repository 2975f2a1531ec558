"""Formats against two independent implementations, on every code, midpoint, neighbour and random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
from gfloat import FormatInfo
from gfloat.types import Domain

from plugins.formats import FloatFormat, get_format

ML_DTYPES: dict[str, Any] = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


def finite_gfloat(exponent_bits: int, mantissa_bits: int, *, signed: bool = True) -> FormatInfo:
    return FormatInfo(
        f"e{exponent_bits}m{mantissa_bits}",
        k=int(signed) + exponent_bits + mantissa_bits,
        precision=mantissa_bits + 1,
        bias=2 ** (exponent_bits - 1) - 1,
        is_signed=signed,
        domain=Domain.Finite,
        has_nz=signed,
        num_high_nans=0,
        has_subnormals=True,
        is_twos_complement=False,
    )


GFLOAT = {
    "e2m0": finite_gfloat(2, 0),
    "e2m1": gfloat.formats.format_info_ocp_e2m1,
    "e1m2": finite_gfloat(1, 2),
    "e3m0": finite_gfloat(3, 0),
    "e2m3": gfloat.formats.format_info_ocp_e2m3,
    "e3m2": gfloat.formats.format_info_ocp_e3m2,
    "e4m3": gfloat.formats.format_info_ocp_e4m3,
    "e3m4": finite_gfloat(3, 4),
    "ue2m4": finite_gfloat(2, 4, signed=False),
    "ue2m2": finite_gfloat(2, 2, signed=False),
}


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return np.array_equal(ours, theirs, equal_nan=True) and np.array_equal(np.signbit(ours), np.signbit(theirs))


@pytest.mark.parametrize("name", [*ML_DTYPES, "e8m0"])
def test_decode_agrees_with_ml_dtypes(name: str) -> None:
    fmt = get_format(name)
    dtype = ML_DTYPES.get(name, ml_dtypes.float8_e8m0fnu)
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    theirs = codes.view(dtype).astype(np.float32)
    finite = ~np.isnan(theirs)
    assert np.array_equal(np.isnan(fmt.decode(codes)), ~finite)
    assert same_bits(fmt.decode(codes)[finite], theirs[finite])


@pytest.mark.parametrize("name", ML_DTYPES)
def test_encode_agrees_with_ml_dtypes_up_to_the_largest_value(name: str, probe: Callable[..., np.ndarray]) -> None:
    fmt = get_format(name)
    numbers = probe(fmt)
    numbers = numbers[np.abs(numbers) <= fmt.max]
    assert numbers.size > 20_000
    assert np.array_equal(fmt.encode(numbers), numbers.astype(ML_DTYPES[name]).view(np.uint8))


def test_e3m4_agrees_with_ml_dtypes_below_the_ieee_specials(probe: Callable[..., np.ndarray]) -> None:
    """ml_dtypes' float8_e3m4 keeps its largest exponent for infinity and NaN; ours is finite up to the last code."""
    fmt = get_format("e3m4")
    largest = float(ml_dtypes.finfo(ml_dtypes.float8_e3m4).max)
    assert largest < fmt.max
    numbers = probe(fmt)
    numbers = numbers[np.abs(numbers) <= largest]
    assert np.array_equal(fmt.encode(numbers), numbers.astype(ml_dtypes.float8_e3m4).view(np.uint8))


def test_e8m0_agrees_with_ml_dtypes_except_on_ties(probe: Callable[..., np.ndarray]) -> None:
    """ml_dtypes rounds E8M0's midpoints up, and up too whatever lies below float32's normal numbers."""
    fmt = get_format("e8m0")
    numbers = probe(fmt)
    numbers = numbers[(numbers >= np.finfo(np.float32).tiny) & (numbers <= fmt.max)]
    ties = np.isin(numbers, fmt.values[fmt.valid] * 1.5)
    ours, theirs = fmt.encode(numbers), numbers.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    assert (~ties).sum() > 10_000
    assert np.array_equal(ours[~ties], theirs[~ties])
    assert ties.sum() == np.count_nonzero(fmt.valid) - 2
    assert np.array_equal(ours[ties], theirs[ties] - theirs[ties] % 2)


@pytest.mark.parametrize("name", GFLOAT)
def test_decode_agrees_with_gfloat(name: str) -> None:
    codes = np.arange(2 ** get_format(name).bits, dtype=np.uint8)
    theirs = gfloat.decode_ndarray(GFLOAT[name], codes.astype(np.int64))
    valid = get_format(name).valid
    assert same_bits(get_format(name).decode(codes)[valid], theirs.astype(np.float32)[valid])
    assert np.isnan(theirs[~valid]).all()


@pytest.mark.parametrize("name", GFLOAT)
def test_round_agrees_with_gfloat_beyond_the_largest_value_too(name: str, probe: Callable[..., np.ndarray]) -> None:
    fmt = get_format(name)
    numbers = probe(fmt)
    # Of what is negative gfloat makes nothing without a sign.
    exact = np.maximum(numbers, np.float32(-np.inf if fmt.min else 0)).astype(np.float64)
    theirs = gfloat.round_ndarray(GFLOAT[name], exact, sat=True)
    assert same_bits(fmt.round(numbers), theirs.astype(np.float32))


@pytest.mark.parametrize("name", ["int4", "int6", "int8"])
def test_integers_agree_with_rint(name: str, probe: Callable[..., np.ndarray]) -> None:
    fmt = get_format(name)
    numbers = probe(fmt)
    assert np.array_equal(fmt.round(numbers), np.clip(np.rint(numbers), -fmt.max, fmt.max))


@pytest.mark.parametrize(("small", "large", "shift"), [("e2m3", "e4m3", 6), ("e3m2", "e5m2", 12), ("e2m1", None, 6)])
def test_small_formats_live_at_the_bottom_of_fp8(
    small: str, large: str | None, shift: int, probe: Callable[..., np.ndarray]
) -> None:
    """E2M3 of x is E4M3 of x/64, E3M2 is E5M2 of x/4096, and the magnitude bits of the codes are the same.

    E2M1 has fewer mantissa bits than E4M3, so only its values, not its rounding, are there: two bits further left.
    """
    fmt, outer = get_format(small), get_format(large or "e4m3")
    assert isinstance(fmt, FloatFormat)
    numbers = probe(fmt) if large else fmt.values
    numbers = numbers[np.abs(numbers) <= fmt.max]
    inside = outer.encode(numbers * np.float32(2.0**-shift))
    codes = fmt.encode(numbers)
    sign = 1 << (fmt.bits - 1)
    left = 0 if large else 2
    assert np.array_equal(inside, ((codes & sign) << (8 - fmt.bits)) | ((codes & (sign - 1)) << left))
    assert same_bits(outer.decode(inside) * np.float32(2.0**shift), fmt.round(numbers))
