"""Products in a container: what enters it, what its accumulator must hold, and whether sums are exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from plugins.container_product import ContainerProduct, foldable_multipliers
from plugins.containers import CONTAINERS, FP8, FP16, FP32, INT8, Container, multipliers
from plugins.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS, get_format

PAIRS = [(weight, act) for weight in WEIGHT_FORMATS for act in ACTIVATION_FORMATS]


def product(
    weight: str, act: str | None, container: Container, k: int = 128, found: tuple[int, ...] = (1,)
) -> ContainerProduct:
    activations = None if act is None else get_format(act)
    return ContainerProduct(get_format(weight), activations, container, k, found)


def largest_sum(weight: str, act: str, k: int, multiplier: int) -> int:
    """k times the largest product, summed one after the other in 64 bits."""
    numerators = [int(get_format(name).numerators.max()) for name in (weight, act)]
    return int((np.full(k, numerators[0] * multiplier, np.int64) * np.full(k, numerators[1], np.int64)).sum())


@pytest.mark.parametrize("k", [1, 4608, 8192])
@pytest.mark.parametrize("multiplier", [1, 10])
def test_the_accumulator_bound_is_reached_and_never_passed(k: int, multiplier: int) -> None:
    found = product("e2m1", "e2m3", INT8, k, (1, multiplier))
    assert found.accumulator_bound == largest_sum("e2m1", "e2m3", k, multiplier)
    assert found.exact


def test_w4a6_is_exact_in_int8_at_every_multiplier() -> None:
    for name in ("e2m1", "e1m2", "e3m0"):
        found = product(name, "e2m3", INT8, 8192, multipliers(get_format(name), INT8))
        assert found.exact, found.reason


def test_w4a6_is_exact_in_float_accumulators_only_without_multipliers() -> None:
    for container in (FP8, FP16, FP32):
        assert product("e2m1", "e2m3", container, 4608).exact
    found = product("e2m1", "e2m3", FP32, 4608, (1, 10))
    assert (found.exact, found.holds_operands) == (False, True)
    assert "products are exact, but sums of 4608 reach 33177600, past the accumulator's 16777216" in found.reason


def test_w4a8_holds_its_operands_in_fp8_but_sums_are_rounded() -> None:
    found = product("e2m1", "e4m3", FP8, 1152)
    assert (found.exact, found.holds_operands) == (False, True)
    assert product("e2m1", "e4m3", FP8, 6).exact


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_the_limit_itself_is_exact_and_one_more_is_not(container: Container) -> None:
    for weight, act in PAIRS:
        found = product(weight, act, container)
        if not found.holds_operands:
            assert not found.exact
            continue
        longest = container.accumulator_limit // (get_format(weight).max_numerator * get_format(act).max_numerator)
        assert not replace(found, k=longest + 1).exact
        assert longest == 0 or replace(found, k=longest).exact


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("act", ACTIVATION_FORMATS)
@pytest.mark.parametrize("weight", WEIGHT_FORMATS)
def test_factors_take_operands_into_the_container_and_products_back(
    weight: str, act: str, container: Container
) -> None:
    found = product(weight, act, container, found=foldable_multipliers(get_format(weight), container))
    if not found.holds_operands:
        assert None in (found.weight_factor, found.activation_factor) or found.unheld_multipliers
        return
    assert found.weight_factor is not None
    assert found.activation_factor is not None
    weights, activations = (
        get_format(name).values[get_format(name).valid].astype(np.float64) for name in (weight, act)
    )
    for multiplier in found.multipliers:
        inside = [weights * multiplier * found.weight_factor, activations * found.activation_factor]
        assert all(np.array_equal(part.astype(container.dtype).astype(np.float64), part) for part in inside)
        back = np.multiply.outer(*inside) / (found.weight_factor * found.activation_factor * multiplier)
        assert np.array_equal(back, np.multiply.outer(weights, activations))


def test_wide_containers_fold_what_int8_folds() -> None:
    for name in ("e2m1", "e1m2", "int4", "e2m3"):
        for container in (INT8, FP16, FP32):
            assert foldable_multipliers(get_format(name), container) == multipliers(get_format(name), INT8)
    assert foldable_multipliers(get_format("e2m1"), FP8) == multipliers(get_format("e2m1"), FP8)
    assert foldable_multipliers(get_format("e4m3"), FP32) == (1,)


def test_free_group_scales_are_no_integers() -> None:
    found = ContainerProduct(get_format("e2m1"), get_format("e2m3"), INT8, 128, free_groups=True)
    assert (found.exact, found.accumulator_bound, found.accumulator_bits) == (False, None, None)
    assert "do not factor out" in found.reason


def test_bits() -> None:
    assert product("e2m1", "e2m3", INT8, 2**10).accumulator_bits == pytest.approx((np.log2(720) + 10, 31))


@pytest.mark.parametrize(
    ("weight", "act", "container", "multiplier", "reason"),
    [
        ("e2m1", "e4m3", INT8, 1, "e4m3 has values that int8 does not hold"),
        ("e3m2", "e2m3", INT8, 1, "e3m2 has values that int8 does not hold"),
        ("e2m1", "e3m4", FP8, 1, "e3m4 has values that fp8 does not hold"),
        ("e2m1", "e2m3", INT8, 11, "e2m1 times 11 is not exact in int8; largest multiplier: 10"),
        ("e2m1", "e2m3", FP8, 7, "e2m1 times 7 is not exact in fp8"),
        ("e2m1", "e2m3", INT8, 10**6, "times 1000000 is not exact"),
        ("e2m1", None, INT8, 1, "not quantized"),
    ],
)
def test_refusals_say_why(weight: str, act: str | None, container: Container, multiplier: int, reason: str) -> None:
    found = product(weight, act, container, found=(1, multiplier))
    assert not found.exact
    assert reason in found.reason
