"""Learned rounding: on the grid by construction, with the published gradients, indifferent to the weight's unit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from exporter.calibration.adaround import GAMMA, ZETA, LearnedRounding, Penalty, Schedule
from exporter.calibration.scales import choose_scales
from exporter.quantize import expand_scales
from exporter.rounding import round_to_format
from plugins.formats import WEIGHT_FORMATS, Format, get_format


def _dense_weight(fmt: Format) -> Tensor:
    """Values in units of the scale that visit every cell of the grid, its edges, and beyond the range."""
    grid = np.unique(fmt.values[np.isfinite(fmt.values)]).astype(np.float64)
    inside = [grid[:-1] + (grid[1:] - grid[:-1]) * share for share in (0.0, 0.1, 0.5, 0.9)]
    edges = [grid, np.nextafter(grid.astype(np.float32), np.float32(np.inf)), [fmt.max * 1.5, -fmt.max * 1.5]]
    return torch.from_numpy(np.concatenate([*inside, *edges]).astype(np.float32))[None]


def _values(fmt: Format) -> set[float]:
    return {float(value) for value in fmt.values if abs(value) <= fmt.max}


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_both_decisions_of_every_weight_are_values_of_the_format(name: str) -> None:
    fmt = get_format(name)
    weight = _dense_weight(fmt)
    rounding = LearnedRounding(weight, torch.ones(1, 1), fmt)
    for sign in (-1.0, 1.0):
        with torch.no_grad():
            rounding.alpha.fill_(sign)
        decided = rounding.hard_values()
        assert set(decided.flatten().tolist()) <= _values(fmt)
        assert torch.equal(rounding.soft_weight(None).sign() * decided.sign(), decided.sign().square())


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_the_two_choices_enclose_the_weight_without_a_value_between_them(name: str) -> None:
    fmt = get_format(name)
    weight = _dense_weight(fmt)
    rounding = LearnedRounding(weight, torch.ones(1, 1), fmt)
    lower, upper = rounding.lower.abs()[0], (rounding.lower + rounding.gap).abs()[0]
    magnitude = weight.abs().clamp(max=fmt.max)[0]
    assert bool(((lower <= magnitude) & (magnitude <= upper)).all())
    magnitudes = torch.tensor(sorted({abs(value) for value in _values(fmt)}))
    assert torch.equal(
        torch.searchsorted(magnitudes, upper) - torch.searchsorted(magnitudes, lower), torch.ones_like(lower).long()
    )


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_it_starts_at_the_original_weight_and_decides_like_rounding_to_nearest(name: str) -> None:
    fmt = get_format(name)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    scales = choose_scales(weight, fmt, 32, "absmax")
    rounding = LearnedRounding(weight, scales, fmt)
    torch.testing.assert_close(rounding.soft_weight(None), weight, rtol=1e-4, atol=1e-5)
    nearest = round_to_format(weight / expand_scales(scales, 64), fmt)
    assert torch.equal(rounding.hard_values(), nearest + 0.0)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_it_can_start_with_any_values_of_the_format(name: str) -> None:
    """Whatever value a weight is to start with, the other choice is that value's neighbour on the weight's side."""
    fmt = get_format(name)
    grid = torch.from_numpy(np.unique(fmt.values[np.isfinite(fmt.values)]))[-64:]
    grid = grid[grid.abs() <= fmt.max]
    start, weight = torch.cartesian_prod(grid, torch.cat([grid, grid[:-1].lerp(grid[1:], 0.3)])).T.contiguous()[:, None]
    rounding = LearnedRounding(weight, torch.ones(1, 1), fmt, start)
    assert torch.equal(rounding.hard_values(), start + 0.0)
    h = torch.sigmoid(rounding.alpha.detach() * rounding.inverse_step) * (ZETA - GAMMA) + GAMMA
    assert float((h - 0.5).abs().min()) > 0.09
    with torch.no_grad():
        rounding.alpha.neg_()
    other = rounding.hard_values()
    assert set(other.flatten().tolist()) <= _values(fmt)
    between = (torch.minimum(start, other) < grid[:, None]) & (grid[:, None] < torch.maximum(start, other))
    assert not bool(between.any())
    outside = start.abs() < fmt.max
    assert bool(((other - start) * (weight - start) >= 0)[outside].all())


@pytest.mark.parametrize("penalty", [None, Penalty(0.3, 20.0), Penalty(0.3, 5.3), Penalty(0.3, 2.0)])
def test_gradients_are_those_of_the_plain_formula(penalty: Penalty | None) -> None:
    fmt = get_format("e2m1")
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(8, 32, generator=generator)
    rounding = LearnedRounding(weight, choose_scales(weight, fmt, 16, "absmax"), fmt)
    with torch.no_grad():
        rounding.alpha.add_(torch.randn(8, 32, generator=generator) * 0.5)
    target = torch.randn(8, 32, generator=generator)
    (rounding.soft_weight(penalty) - target).square().sum().backward()  # type: ignore[no-untyped-call]
    found = rounding.alpha.grad
    alpha = rounding.alpha.detach().clone().requires_grad_()
    h = (torch.sigmoid(alpha * rounding.inverse_step) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
    loss = (rounding.lower + h * rounding.gap - target).square().sum()
    if penalty is not None:
        loss = loss + penalty.weight * (1 - (2 * h - 1).abs().pow(penalty.beta)).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert found is not None
    assert alpha.grad is not None
    assert bool((h == 0).any()), "no clipped weight: the test would miss its gradient"
    torch.testing.assert_close(found, alpha.grad, rtol=1e-4, atol=1e-5)


def test_the_penalty_alone_decides_every_rounding() -> None:
    fmt = get_format("e2m1")
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(4))
    rounding = LearnedRounding(weight, choose_scales(weight, fmt, 0, "absmax"), fmt)
    penalty = Penalty(1.0, 2.0)
    before = float(rounding.penalty(penalty).detach())
    optimizer = torch.optim.Adam([rounding.alpha], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        rounding.soft_weight(penalty).mul(0.0).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert before > 10
    assert float(rounding.penalty(penalty).detach()) < 0.01 * before
    soft = rounding.soft_weight(None).detach() / expand_scales(choose_scales(weight, fmt, 0, "absmax"), 32)
    torch.testing.assert_close(soft, rounding.hard_values(), rtol=1e-3, atol=1e-3)


def test_the_penalty_waits_for_the_warm_up_and_sharpens_linearly() -> None:
    schedule = Schedule(iterations=100, warmup=0.2, weight=0.5, beta_start=20.0, beta_end=2.0)
    assert schedule.penalty(19) is None
    assert schedule.penalty(20) == Penalty(0.5, 20.0)
    assert schedule.penalty(60) == Penalty(0.5, 11.0)
    last = schedule.penalty(99)
    assert last is not None
    assert 2.0 < last.beta < 2.3


def test_a_schedule_may_begin_with_its_penalty() -> None:
    assert Schedule(1, 0.0, 0.5, 20.0, 2.0).penalty(0) == Penalty(0.5, 20.0)
