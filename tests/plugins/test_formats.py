"""Formats: the facts that the literature states, the rules of rounding, and what is refused."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest

import plugins
from plugins.formats import (
    ACTIVATION_FORMATS,
    FORMATS,
    SIGNED_ACTIVATION_FORMATS,
    UNSIGNED_ACTIVATION_FORMATS,
    WEIGHT_FORMATS,
    FloatFormat,
    IntFormat,
    NotRepresentableError,
    UnknownFormatError,
    get_format,
)

# name: bits, bias, max, smallest positive value (OCP Microscaling 1.0 tables; E2M0, E1M2, E3M0, E3M4 by the same rule)
FACTS = {
    "e2m0": (3, 1, 4.0, 1.0),
    "e2m1": (4, 1, 6.0, 0.5),
    "e1m2": (4, 0, 3.5, 0.5),
    "e3m0": (4, 3, 16.0, 0.25),
    "e2m3": (6, 1, 7.5, 0.125),
    "e3m2": (6, 3, 28.0, 0.0625),
    "e4m3": (8, 7, 448.0, 2.0**-9),
    "e5m2": (8, 15, 57344.0, 2.0**-16),
    "e3m4": (8, 3, 31.0, 2.0**-6),
    "e8m0": (8, 127, 2.0**127, 2.0**-127),
    "ue2m4": (6, 1, 7.75, 0.0625),
    "ue2m2": (4, 1, 7.0, 0.25),
}
INTEGERS = {"int3": 3, "int4": 7, "int6": 31, "int8": 127}
WITH_ZERO = [name for name in FORMATS if name != "e8m0"]


def test_every_format_has_its_facts_checked() -> None:
    assert {*FACTS, *INTEGERS} == set(FORMATS)


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_floats(name: str) -> None:
    fmt = get_format(name)
    assert isinstance(fmt, FloatFormat)
    assert (fmt.bits, fmt.bias, fmt.max, fmt.step) == FACTS[name]


@pytest.mark.parametrize(("name", "largest"), INTEGERS.items())
def test_integers_are_symmetric(name: str, largest: int) -> None:
    fmt = get_format(name)
    assert (fmt.max, fmt.step) == (largest, 1.0)
    assert sorted(fmt.values[fmt.valid]) == list(range(-largest, largest + 1))


def test_numerators_of_the_small_formats() -> None:
    positive = {
        "e2m0": [0, 1, 2, 4],
        "e2m1": [0, 1, 2, 3, 4, 6, 8, 12],
        "e1m2": [0, 1, 2, 3, 4, 5, 6, 7],
        "e3m0": [0, 1, 2, 4, 8, 16, 32, 64],
    }
    for name, expected in positive.items():
        numerators = get_format(name).numerators
        assert numerators.tolist() == expected + [-number for number in expected]


@pytest.mark.parametrize("name", WITH_ZERO)
def test_numerators_are_values_in_units_of_the_step(name: str) -> None:
    fmt = get_format(name)
    assert np.array_equal(fmt.numerators[fmt.valid] * fmt.step, fmt.values[fmt.valid])
    assert not fmt.numerators[~fmt.valid].any()
    assert fmt.max_numerator == np.abs(fmt.numerators).max()


def test_a_range_wider_than_64_bits_has_no_numerators() -> None:
    with pytest.raises(NotRepresentableError, match="e8m0"):
        _ = get_format("e8m0").numerators


def test_uniform_grids() -> None:
    assert [name for name in FORMATS if get_format(name).is_uniform] == ["e1m2", "int3", "int4", "int6", "int8"]


@pytest.mark.parametrize("name", WITH_ZERO)
def test_the_step_of_a_value_follows_from_min_normal_and_mantissa(name: str) -> None:
    """The formula that calibration uses for floats and integers alike."""
    fmt = get_format(name)
    values = np.unique(np.abs(fmt.values[fmt.valid])).astype(np.float64)
    exponents = np.floor(np.log2(np.maximum(values[:-1], fmt.min_normal)))
    expected = np.maximum(2.0 ** (exponents - fmt.mantissa_bits), fmt.step)
    assert np.array_equal(np.diff(values), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_every_valid_code_survives_a_round_trip(name: str) -> None:
    fmt = get_format(name)
    codes = np.arange(2**fmt.bits)[fmt.valid].astype(np.uint8)
    assert np.array_equal(fmt.encode(fmt.decode(codes)), codes)


@pytest.mark.parametrize("name", WITH_ZERO)
def test_saturation(name: str) -> None:
    fmt = get_format(name)
    beyond = np.array([np.inf, 3e38, fmt.max * 1.01], np.float32)
    assert np.array_equal(fmt.round(beyond), np.full(3, fmt.max, np.float32))
    assert np.array_equal(fmt.round(-beyond), np.full(3, fmt.min, np.float32))
    assert fmt.min == fmt.values[fmt.valid].min() == fmt.min_numerator * fmt.step


@pytest.mark.parametrize("name", FORMATS)
def test_midpoints_go_to_the_even_code(name: str) -> None:
    fmt = get_format(name)
    positive = np.unique(np.abs(fmt.values[fmt.valid]))
    exact = positive.astype(np.float64)
    codes = fmt.encode((exact[:-1] + exact[1:]) / 2)
    lower = fmt.encode(positive[:-1])
    assert not (codes % 2).any()
    assert set(np.unique(codes.astype(int) - lower)) <= {0, 1}


def test_e3m0_ties_follow_the_code_and_not_the_mantissa() -> None:
    """Codes 1, 2, 3 are 1/4, 1/2, 1: both midpoints around code 2 go to it."""
    fmt = get_format("e3m0")
    assert fmt.encode(np.array([0.375, 0.75], np.float32)).tolist() == [2, 2]


def test_the_sign_of_zero() -> None:
    zeros = np.array([0.0, -0.0, 1e-9, -1e-9], np.float32)
    assert get_format("e2m1").encode(zeros).tolist() == [0, 8, 0, 8]
    assert get_format("int4").encode(zeros).tolist() == [0, 0, 0, 0]


def test_integer_codes_are_twos_complement() -> None:
    assert get_format("int4").encode(np.array([-7.0, -1.0, 7.0], np.float32)).tolist() == [9, 15, 7]


def test_float64_is_rounded_once() -> None:
    """Through float32 the number would become the midpoint, and go down to the even code."""
    just_above = np.array([0.25 + 1e-12])
    assert get_format("e2m1").encode(just_above).tolist() == [1]
    assert get_format("e2m1").encode(just_above.astype(np.float32)).tolist() == [0]


def test_encoding_leaves_its_argument_alone() -> None:
    values = np.array([1.3, -9.0, 0.2], np.float32)
    before = values.copy()
    get_format("e2m3").round(values)
    assert np.array_equal(values, before)


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e3m4", "int8"])
def test_nan_is_refused_where_there_is_none(name: str) -> None:
    with pytest.raises(NotRepresentableError, match=f"{name} has no NaN, and 2 of"):
        get_format(name).encode(np.array([1.0, np.nan, -np.nan], np.float32))


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e8m0"])
def test_nan_has_a_code(name: str) -> None:
    fmt = get_format(name)
    decoded = fmt.round(np.array([1.0, np.nan, -np.nan], np.float32))
    assert np.isnan(decoded).tolist() == [False, True, True]


@pytest.mark.parametrize("name", UNSIGNED_ACTIVATION_FORMATS)
def test_what_is_negative_is_zero_without_a_sign(name: str) -> None:
    negative = np.array([-np.inf, -1e30, -1.0, -1e-9, -0.0], np.float32)
    assert get_format(name).encode(negative).tolist() == [0] * 5
    assert not np.signbit(get_format(name).round(negative)).any()


def test_negative_scales_are_refused() -> None:
    with pytest.raises(NotRepresentableError, match="e8m0 is unsigned, and 1"):
        get_format("e8m0").encode(np.array([-1.0, 1.0], np.float32))


@pytest.mark.parametrize(
    "codes", [np.array([16], np.uint8), np.array([-1], np.int8), np.array([1.0], np.float32)], ids=str
)
def test_codes_out_of_range_are_refused(codes: np.ndarray) -> None:
    with pytest.raises(NotRepresentableError, match="e2m1: codes must"):
        get_format("e2m1").decode(codes)


def test_shapes_are_kept() -> None:
    fmt = get_format("e2m1")
    assert fmt.round(np.float32(1.2)).shape == ()
    assert fmt.round(np.zeros((0, 3), np.float32)).shape == (0, 3)
    assert fmt.encode(np.zeros((2, 3, 4), np.float32)).dtype == np.uint8


def test_tables_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        get_format("e2m1").values[0] = 1


def test_unknown_names_get_a_suggestion() -> None:
    for typed, meant in [("e2m4", "e2m3"), ("E2M1", "e2m1"), ("e4m3fn", "e4m3"), ("int5", "int8")]:
        with pytest.raises(UnknownFormatError, match=rf"unknown format '{typed}'; did you mean '{meant}'\?"):
            get_format(typed)
    with pytest.raises(UnknownFormatError, match="valid: e2m0, e2m1, e1m2"):
        get_format("posit")


def test_which_formats_are_for_what() -> None:
    assert "e8m0" not in WEIGHT_FORMATS
    assert set(WEIGHT_FORMATS) - set(ACTIVATION_FORMATS) == {"e2m0", "int3", "e3m0"}
    assert set(ACTIVATION_FORMATS) - set(WEIGHT_FORMATS) == set(UNSIGNED_ACTIVATION_FORMATS) == {"ue2m4", "ue2m2"}
    assert set(ACTIVATION_FORMATS) - set(UNSIGNED_ACTIVATION_FORMATS) == set(SIGNED_ACTIVATION_FORMATS)


def test_a_bias_can_be_overridden() -> None:
    fmt = dataclasses.replace(FORMATS["e4m3"], name="e4m3b8", bias_override=8)
    assert fmt.max == FORMATS["e4m3"].max / 2


def test_formats_are_hashable_values() -> None:
    assert IntFormat("int4", 4) == FORMATS["int4"]
    assert {FORMATS["e2m1"]: 1}[FloatFormat("e2m1", 2, 1)] == 1


def test_no_limit_of_a_format_is_typed_again() -> None:
    """The largest values are derived: a literal 448, 28.0 or 7.5 in the package would be a second source of truth."""
    maxima = {FORMATS[name].max for name in FACTS}
    for path in Path(plugins.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, float | int):
                suspicious = isinstance(node.value, float) or node.value > 2 * INTEGERS["int8"]
                assert not (suspicious and node.value in maxima), f"{path.name}:{node.lineno}: {node.value}"
