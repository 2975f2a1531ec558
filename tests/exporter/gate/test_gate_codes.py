"""Quantized activations: every encoding decodes to what was encoded, and only boundary cases may differ."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.gate.codes import compare_codes, encode_values
from exporter.passes.encodings import decode
from plugins.float_quantize.reference import quantize_online
from plugins.formats import get_format

E2M3 = get_format("e2m3")


def tokens(rows: int = 6, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        ("e2m3", "uint8"),
        ("e2m3", "int8"),
        ("e2m3", "fp8"),
        ("e4m3", "fp8"),
        ("e4m3", "fp8_bytes"),
        ("e3m4", "float32"),
        ("int8", "uint8"),
    ],
)
def test_encodings_decode_to_the_values(name: str, encoding: str) -> None:
    fmt = get_format(name)
    values = fmt.values[fmt.valid]
    assert np.array_equal(decode(encode_values(values, fmt, encoding), fmt, encoding), values)


def test_an_unknown_encoding_is_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        encode_values(np.zeros(1, np.float32), E2M3, "bfloat16")


def test_equal_codes_agree_in_every_row() -> None:
    x = tokens()
    values, scales = quantize_online(x, E2M3)
    result = compare_codes(x, scales, values, values.copy(), E2M3)
    assert (result.mismatches, result.explained, result.count, result.failure) == (0, 0, x.size, "")
    assert result.rows_agree.all()


def test_the_sign_of_zero_does_not_count() -> None:
    x, zeros, scales = np.full((1, 4), 1e-9, np.float32), np.zeros((1, 4), np.float32), np.ones((1, 1), np.float32)
    assert compare_codes(x, scales, zeros, -zeros, E2M3).mismatches == 0


@pytest.mark.parametrize("ulps", [0, 3, -3])
def test_a_flip_at_a_rounding_boundary_is_explained(ulps: int) -> None:
    x = np.full((2, 4), 1.0, np.float32)
    x[1, 2] = np.float32(1.0625) + ulps * np.spacing(np.float32(1.0625))
    expected, found = np.full((2, 4), 1.0, np.float32), np.full((2, 4), 1.0, np.float32)
    expected[1, 2], found[1, 2] = 1.0, 1.125
    result = compare_codes(x, np.ones((2, 1), np.float32), expected, found, E2M3)
    assert (result.mismatches, result.explained, result.failure) == (1, 1, "")
    assert result.rows_agree.tolist() == [True, False]


@pytest.mark.parametrize(("value", "found"), [(1.0626, 1.125), (1.0625, 1.25), (1.0625, 1.1), (1.0625, np.nan)])
def test_a_flip_elsewhere_is_a_failure_that_says_where(value: float, found: float) -> None:
    x = np.full((2, 4), 1.0, np.float32)
    x[1, 2] = value
    given = np.full((2, 4), 1.0, np.float32)
    given[1, 2] = found
    result = compare_codes(x, np.ones((2, 1), np.float32), np.ones((2, 4), np.float32), given, E2M3)
    assert (result.mismatches, result.explained) == (1, 0)
    assert "row 1, channel 2" in result.failure


def test_too_many_explained_flips_are_a_failure() -> None:
    x = np.full((100, 100), 1.0625, np.float32)
    expected, found = np.ones_like(x), np.ones_like(x)
    found[:2] = 1.125
    result = compare_codes(x, np.ones((100, 1), np.float32), expected, found, E2M3)
    assert result.mismatches == result.explained == 200
    assert "at most 1 may" in result.failure


def test_scales_of_blocks_belong_to_their_columns() -> None:
    scales = np.array([[1.0, 4.0, 0.0]], np.float32)
    x = np.full((1, 6), 1.0625, np.float32)
    x[0, 2:] = 4.25
    given, flipped = np.ones((1, 6), np.float32), np.ones((1, 6), np.float32)
    flipped[0, 3] = 1.125
    assert compare_codes(x, scales, given, flipped, E2M3).failure == ""
    flipped[0, 3], flipped[0, 5] = 1.0, 1.125
    assert "channel 5" in compare_codes(x, scales, given, flipped, E2M3).failure
