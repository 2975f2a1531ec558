"""Containers: which formats are exact in which hardware type, recomputed here from the codes alone."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from plugins.containers import (
    CONTAINERS,
    FP8,
    FP16,
    INT8,
    MAX_MULTIPLIER,
    Container,
    activation_factor,
    factor,
    fits,
    multipliers,
)
from plugins.formats import FORMATS, WEIGHT_FORMATS, get_format

FITS = {
    "int8": {"e2m0", "e2m1", "e1m2", "e3m0", "e2m3", "ue2m4", "ue2m2", "int3", "int4", "int6", "int8"},
    "int4": {"e2m0", "e1m2", "int3", "int4"},
    "fp8": {"e2m0", "e2m1", "e1m2", "e3m0", "e2m3", "e3m2", "e4m3", "ue2m2", "int3", "int4"},
    "fp16": set(FORMATS) - {"e8m0"},
    "fp32": set(FORMATS),
}


def values_of(name: str) -> np.ndarray:
    fmt = get_format(name)
    return fmt.values[fmt.valid].astype(np.float64)


def survives(numbers: np.ndarray, container: Container) -> bool:
    """A second opinion on exactness: through the container's own cast and back."""
    with np.errstate(over="ignore"):
        inside = numbers.astype(np.float32).astype(container.dtype)
    return np.array_equal(inside.astype(np.float64), numbers)


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_fits(container: str) -> None:
    assert {name for name in FORMATS if fits(get_format(name), CONTAINERS[container])} == FITS[container]


@pytest.mark.parametrize(
    ("name", "largest"), [("e2m1", 10), ("e1m2", 18), ("e3m0", 1), ("e2m3", 2), ("int4", 18), ("int6", 4), ("int8", 1)]
)
def test_int8_multipliers_fill_the_container(name: str, largest: int) -> None:
    found = multipliers(get_format(name), INT8)
    assert found == tuple(range(1, largest + 1))
    numerators = get_format(name).numerators
    assert np.abs(numerators * largest).max() <= 127 < np.abs(numerators * (largest + 1)).max()


@pytest.mark.parametrize("name", ["e3m2", "e4m3", "e3m4"])
def test_what_does_not_fit_has_no_multiplier(name: str) -> None:
    assert multipliers(get_format(name), INT8) == ()


@pytest.mark.parametrize(
    ("name", "significands"),
    [("e2m1", {1, 1.25, 1.5}), ("e3m0", {1 + i / 8 for i in range(8)}), ("e1m2", {1}), ("e2m3", {1}), ("e3m2", {1})],
)
def test_fp8_multipliers_are_significands_times_powers_of_two(name: str, significands: set[float]) -> None:
    found = multipliers(get_format(name), FP8)
    expected = [m for m in range(1, MAX_MULTIPLIER + 1) if 2 * np.frexp(m)[0] in significands]
    assert list(found) == expected


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_values_times_factor_survive_in_the_container(name: str, container: Container) -> None:
    fmt = get_format(name)
    found = factor(fmt, container)
    if found is None:
        assert name not in FITS[container.name]
        return
    assert survives(values_of(name) * found, container)
    assert np.frexp(found)[0] == 0.5
    if container == INT8:
        assert np.array_equal(values_of(name) * found, fmt.numerators[fmt.valid])


@pytest.mark.parametrize("container", [INT8, FP8, FP16], ids=lambda container: container.name)
@pytest.mark.parametrize("name", ["e2m1", "e1m2", "e3m0", "int4"])
def test_one_factor_serves_every_multiplier(name: str, container: Container) -> None:
    allowed = multipliers(get_format(name), container)
    found = factor(get_format(name), container, max_multiplier=max(allowed))
    assert found is not None
    assert all(survives(values_of(name) * m * found, container) for m in allowed)


def test_floats_enter_their_container_as_they_are() -> None:
    for name in FITS["fp8"]:
        assert factor(get_format(name), FP8) == 1.0


def test_every_e2m1_e2m3_product_is_exact() -> None:
    """All 16 × 64 pairs, as INT8 numerators and as E4M3 numbers."""
    weight, act = get_format("e2m1"), get_format("e2m3")
    exact = np.multiply.outer(weight.values.astype(np.float64), act.values.astype(np.float64))
    numerators = [fmt.numerators.astype(np.int8) for fmt in (weight, act)]
    products = np.multiply.outer(*(n.astype(np.int32) for n in numerators)) * (weight.step * act.step)
    assert np.array_equal(products, exact)
    eighths = [fmt.values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) for fmt in (weight, act)]
    assert np.array_equal(np.multiply.outer(*eighths).astype(np.float64), exact)


def test_what_e4m3_rounds_alike_enters_fp8_at_its_bottom() -> None:
    assert activation_factor(get_format("e2m3"), FP8) == 2.0**-6
    assert activation_factor(get_format("e4m3"), FP8) == 1.0
    assert activation_factor(get_format("e3m2"), FP8) == 1.0
    assert activation_factor(get_format("e2m3"), INT8) == 8.0
    assert activation_factor(get_format("e4m3"), INT8) is None
    assert survives(values_of("e2m3") * 2.0**-6, FP8)
