"""The activation quantizers: their reference, and their function bodies bit for bit against it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from plugins.float_quantize.reference import TINY, quantize, quantize_online
from plugins.formats import ACTIVATION_FORMATS, UNSIGNED_ACTIVATION_FORMATS, UnknownFormatError, get_format
from plugins.op import OnlineQuantize, Quantize

Run = Callable[..., list[np.ndarray]]


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype == np.float32 and np.array_equal(left.view(np.uint32), right.view(np.uint32))


def tokens(seed: int, *shape: int) -> np.ndarray:
    """Heavy-tailed rows of very different sizes, one of them zero."""
    generator = np.random.default_rng(seed)
    x = generator.standard_t(3, shape) * np.exp2(generator.uniform(-20, 20, (*shape[:-1], 1)))
    x[(0,) * (x.ndim - 1)] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize("name", ACTIVATION_FORMATS)
def test_the_body_rounds_like_the_format(name: str, probe: Callable[..., np.ndarray], run_variant: Run) -> None:
    fmt = get_format(name)
    numbers = probe(fmt)
    [values] = run_variant(Quantize(name), numbers, np.ones(1, np.float32))
    assert same_bits(values, fmt.round(numbers) + np.float32(0))


@pytest.mark.parametrize("name", ["e2m1", "e3m2", "e2m3", "e3m4", "ue2m2"])
def test_every_float_of_a_binade(name: str, run_variant: Run) -> None:
    """One to four mantissa bits, all 2^23 numbers in [1, 2): rounding there is the same in every normal binade."""
    fmt = get_format(name)
    binade = np.arange(0x3F800000, 0x40000000, dtype=np.uint32).view(np.float32)
    [values] = run_variant(Quantize(name), binade, np.ones(1, np.float32))
    assert same_bits(values, fmt.round(binade))


@pytest.mark.parametrize("name", ACTIVATION_FORMATS)
def test_online_body_equals_the_reference(name: str, run_variant: Run) -> None:
    x = tokens(1, 3, 5, 64)
    values, scales = run_variant(OnlineQuantize(name), x)
    expected_values, expected_scales = quantize_online(x, get_format(name))
    assert same_bits(values, expected_values)
    assert same_bits(scales, expected_scales)


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_the_body_runs_in_models_of_other_opsets(opset: int, run_variant: Run) -> None:
    x = tokens(2, 4, 32)
    values, scales = run_variant(OnlineQuantize("e2m3"), x, opset=opset)
    expected_values, expected_scales = quantize_online(x, get_format("e2m3"))
    assert same_bits(values, expected_values)
    assert same_bits(scales, expected_scales)


def test_given_scales_broadcast(run_variant: Run) -> None:
    x = tokens(3, 2, 6, 8)
    scales = np.exp2(np.random.default_rng(0).uniform(-3, 3, (2, 6, 1))).astype(np.float32)
    [values] = run_variant(Quantize("e2m3"), x, scales)
    assert same_bits(values, quantize(x, scales, get_format("e2m3")))


@pytest.mark.parametrize("name", ACTIVATION_FORMATS)
def test_the_largest_of_a_token_lands_on_the_largest_value(name: str) -> None:
    fmt, x = get_format(name), tokens(4, 40, 33)[1:]
    values, scales = quantize_online(x, fmt)
    assert scales.shape == (39, 1)
    assert np.array_equal(np.abs(values).max(axis=-1), np.full(39, fmt.max, np.float32))
    widest_step = np.diff(np.unique(fmt.values[fmt.valid])).max()
    held = x if fmt.min else np.maximum(x, 0)
    assert (np.abs(values * scales - held) <= 0.5001 * widest_step * scales).all()


def test_tokens_are_independent() -> None:
    x = tokens(5, 6, 16)
    together, _ = quantize_online(x, get_format("e2m3"))
    for row, values in zip(x, together, strict=True):
        alone, _ = quantize_online(row[None], get_format("e2m3"))
        assert same_bits(alone[0], values)


@pytest.mark.parametrize("name", UNSIGNED_ACTIVATION_FORMATS)
def test_what_is_negative_counts_nothing_without_a_sign(name: str, run_variant: Run) -> None:
    fmt, x = get_format(name), tokens(7, 9, 64)
    x[1] = -np.abs(x[1])
    for values, scales in (quantize_online(x, fmt), run_variant(OnlineQuantize(name), x)):
        expected_values, expected_scales = quantize_online(np.maximum(x, 0), fmt)
        assert same_bits(values, expected_values)
        assert same_bits(scales, expected_scales)
        assert not values[1].any()


@pytest.mark.parametrize("name", ["e2m3", "e4m3", "ue2m4", "int8"])
def test_a_token_of_zeros_has_a_positive_scale(name: str, run_variant: Run) -> None:
    fmt = get_format(name)
    zeros = np.zeros((1, 8), np.float32)
    values, scales = quantize_online(zeros, fmt)
    assert not values.any()
    assert scales[0, 0] == np.float32(TINY) / np.float32(fmt.max) >= np.finfo(np.float32).tiny
    assert same_bits(run_variant(OnlineQuantize(name), zeros)[1], scales)


def test_the_caller_keeps_its_tensor() -> None:
    x = tokens(6, 4, 8)
    before = x.copy()
    quantize_online(x, get_format("e2m3"))
    assert same_bits(x, before)


@pytest.mark.parametrize("kind", [OnlineQuantize, Quantize])
def test_formats_that_are_not_for_activations_are_refused(kind: type[OnlineQuantize] | type[Quantize]) -> None:
    for name in ("e3m0", "e8m0"):
        with pytest.raises(UnknownFormatError, match=f"'{name}' is no activation format; valid: e2m1"):
            kind(name)
    with pytest.raises(UnknownFormatError, match="unknown format"):
        kind("e2m4")


def test_attributes_are_all_explicit() -> None:
    assert OnlineQuantize("e2m3").attributes(layer="blocks.0.ff") == {
        "layer": "blocks.0.ff",
        "format": "e2m3",
        "granularity": "per_token",
        "axis": -1,
        "plugin_namespace": "fp4export",
        "plugin_version": "1",
    }
