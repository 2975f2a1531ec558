"""Scales: positive, short significands, exactly foldable, and never worse than what the search starts from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exporter.calibration.scales import ZERO_GROUP_SCALE, choose_scales, round_significand
from exporter.quantize import round_to_nearest
from plugins.containers import CONTAINERS, multipliers
from plugins.formats import WEIGHT_FORMATS, Format, get_format

FOLDABLE = [
    (name, container)
    for name in WEIGHT_FORMATS
    for container in ("int8", "fp8")
    if multipliers(get_format(name), CONTAINERS[container])
]


def _weight(rows: int = 24, count: int = 128, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, count, generator=generator) * 0.03
    # Groups of unequal size, as trained weights have them.
    return weight * torch.logspace(-1, 1, count // 32, base=3.0).repeat_interleave(32)


def _error(weight: Tensor, scales: Tensor, fmt: Format, importance: Tensor | None = None) -> float:
    squares = (round_to_nearest(weight, scales, fmt).dequantize(fmt) - weight).square()
    return float((squares if importance is None else squares * importance).double().sum())


def _trailing_zero_bits(scales: Tensor) -> int:
    bits = scales.contiguous().view(torch.int32)
    return int(((bits & -bits).float().log2()).min())


def test_significands_round_to_nearest() -> None:
    scales = torch.rand(1000, generator=torch.Generator().manual_seed(1)) + 1e-3
    rounded = round_significand(scales)
    assert _trailing_zero_bits(rounded) >= 4
    assert float(((rounded - scales) / scales).abs().max()) <= 2.0**-20
    assert torch.equal(round_significand(rounded), rounded)


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_scales_are_positive_and_have_short_significands(name: str, group: int, search: str) -> None:
    weight = _weight()
    scales = choose_scales(weight, get_format(name), group, search)
    assert scales.shape == (24, 128 // group if group else 1)
    assert bool((scales > 0).all())
    assert _trailing_zero_bits(scales) >= 4


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize(("name", "container"), FOLDABLE)
def test_foldable_scales_are_exactly_one_channel_scale_times_allowed_integers(
    name: str, container: str, search: str
) -> None:
    allowed = multipliers(get_format(name), CONTAINERS[container])
    scales = choose_scales(_weight(), get_format(name), 32, search, None, allowed)
    for row in scales:
        channels = [row[0] / m for m in torch.tensor(allowed, dtype=torch.float32)]
        fits = [
            all(
                any(torch.equal(channel * m, scale) and torch.equal(scale / m, channel) for m in allowed)
                for scale in row
            )
            for channel in channels
        ]
        assert any(fits)


@pytest.mark.parametrize("name", ["e2m1", "e1m2", "int4"])
def test_foldable_scales_cost_little_against_free_ones_and_gain_on_channel_scales(name: str) -> None:
    fmt, weight = get_format(name), _weight(64)
    channel = _error(weight, choose_scales(weight, fmt, 0, "mse"), fmt)
    free = _error(weight, choose_scales(weight, fmt, 32, "mse"), fmt)
    allowed = multipliers(fmt, CONTAINERS["int8"])
    folded = _error(weight, choose_scales(weight, fmt, 32, "mse", None, allowed), fmt)
    assert folded <= 1.1 * free
    assert folded < 0.8 * channel


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_searched_scales_are_never_worse_than_absmax(name: str, group: int) -> None:
    fmt, weight = get_format(name), _weight()
    importance = torch.linspace(0.1, 10.0, 128)
    absmax = choose_scales(weight, fmt, group, "absmax")
    searched = choose_scales(weight, fmt, group, "mse", importance)
    assert _error(weight, searched, fmt, importance) <= _error(weight, absmax, fmt, importance)


def test_importance_decides_which_columns_are_kept() -> None:
    weight = torch.tensor([[1.0, 0.11, 0.12, 0.13] * 8])
    fmt = get_format("int4")
    small_matter = torch.tensor([1e-4, 1.0, 1.0, 1.0] * 8)
    plain = choose_scales(weight, fmt, 0, "mse")
    weighted = choose_scales(weight, fmt, 0, "mse", small_matter)
    assert float(weighted) < float(plain)


def test_absmax_scales_let_the_largest_weight_meet_the_largest_value() -> None:
    weight = torch.tensor([[3.0, -12.0, 1.0, 0.5]])
    assert choose_scales(weight, get_format("e2m1"), 2, "absmax").tolist() == [[2.0, pytest.approx(1 / 6, rel=1e-5)]]


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**-10, 2.0**30])
@pytest.mark.parametrize("allowed", [(), tuple(range(1, 11))])
def test_a_weight_in_another_unit_gets_the_same_scales_in_that_unit(factor: float, allowed: tuple[int, ...]) -> None:
    weight, fmt = _weight(), get_format("e2m1")
    scales = choose_scales(weight, fmt, 32, "mse", None, allowed)
    assert torch.equal(choose_scales(weight * factor, fmt, 32, "mse", None, allowed), scales * factor)


@pytest.mark.parametrize("allowed", [(), (1,), tuple(range(1, 11))])
def test_zeros_get_positive_scales_and_do_not_disturb_their_row(allowed: tuple[int, ...]) -> None:
    weight, fmt = _weight(4), get_format("e2m1")
    weight[1] = 0.0
    weight[2, 32:64] = 0.0
    scales = choose_scales(weight, fmt, 32, "mse", None, allowed)
    assert bool((scales > 0).all())
    assert scales[1].tolist() == [ZERO_GROUP_SCALE] * 4
    quantized = round_to_nearest(weight, scales, fmt).dequantize(fmt)
    assert not quantized[1].any()
    assert not quantized[2, 32:64].any()
    assert _error(weight[2:3], scales[2:3], fmt) < 0.02 * float(weight[2].square().sum())


def test_dead_input_channels_do_not_break_the_search() -> None:
    scales = choose_scales(_weight(), get_format("e2m1"), 32, "mse", torch.zeros(128))
    assert bool((scales.isfinite() & (scales > 0)).all())


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 48 do not divide rows of 128"):
        choose_scales(_weight(), get_format("e2m1"), 48, "absmax")


def test_foldable_absmax_scales_just_hold_their_groups() -> None:
    weight, fmt = _weight(), get_format("e2m1")
    allowed = tuple(range(1, 11))
    scales = choose_scales(weight, fmt, 16, "absmax", multipliers=allowed)
    needed = weight.reshape(len(weight), -1, 16).abs().amax(dim=2) / fmt.max
    channel = needed.amax(dim=1, keepdim=True) / allowed[-1]
    assert bool((scales >= needed * (1 - 1e-5)).all())
    assert bool((scales < needed + channel * (1 + 1e-5)).all())
    multiples = (scales / channel).round()
    assert bool(torch.isin(multiples, torch.tensor(allowed, dtype=torch.float32)).all())
    torch.testing.assert_close(scales, channel * multiples, rtol=1e-5, atol=0.0)
