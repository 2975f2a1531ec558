"""Scales chosen by output error: of the same kind, never worse, and better where inputs move together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from exporter.calibration.input_statistics import InputStatistics
from exporter.calibration.output_error import refine_scales, search_scales
from exporter.calibration.scales import ZERO_GROUP_SCALE, choose_scales
from exporter.quantize import round_to_nearest
from plugins.containers import CONTAINERS, multipliers
from plugins.formats import Format, get_format

ROWS, COUNT, GROUP = 24, 128, 32


def _weight(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, COUNT, generator=torch.Generator().manual_seed(seed)) * 0.03


def _inputs(seed: int = 1, tokens: int = 400) -> Tensor:
    """Channels that mostly move together, as those behind a normalisation do."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, 8, generator=generator) @ torch.randn(8, COUNT, generator=generator)
    return mixed + 0.1 * torch.randn(tokens, COUNT, generator=generator) + 0.5


def _error(weight: Tensor, scales: Tensor, fmt: Format, x: Tensor) -> float:
    rounding = round_to_nearest(weight, scales, fmt).dequantize(fmt) - weight
    return float((x.double() @ rounding.double().T).square().sum())


@pytest.mark.parametrize(
    ("name", "group", "container"),
    [("e2m1", GROUP, "int8"), ("e2m1", GROUP, "fp8"), ("e1m2", GROUP, "int8"), ("e2m1", GROUP, ""), ("e3m0", 0, "")],
)
def test_errors_on_other_inputs_fall_too(name: str, group: int, container: str) -> None:
    fmt, weight, x = get_format(name), _weight(), _inputs()
    allowed = multipliers(fmt, CONTAINERS[container]) if container else ()
    gram = x.T @ x
    first = choose_scales(weight, fmt, group, "mse", gram.diagonal() / len(x), allowed)
    refined = refine_scales(weight, first, fmt, gram, allowed)
    assert refined.shape == first.shape
    assert bool((refined > 0).all())
    assert _error(weight, refined, fmt, x) < 0.8 * _error(weight, first, fmt, x)
    generator = torch.Generator().manual_seed(1)
    torch.randn(400, 8, generator=generator)
    mix = torch.randn(8, COUNT, generator=generator)
    fresh = torch.randn(400, 8, generator=torch.Generator().manual_seed(9)) @ mix + 0.5
    assert _error(weight, refined, fmt, fresh) < 0.9 * _error(weight, first, fmt, fresh)


@pytest.mark.parametrize("container", ["int8", "fp8"])
def test_foldable_scales_stay_foldable(container: str) -> None:
    fmt, weight, x = get_format("e2m1"), _weight(), _inputs()
    allowed = multipliers(fmt, CONTAINERS[container])
    first = choose_scales(weight, fmt, GROUP, "mse", None, allowed)
    refined = refine_scales(weight, first, fmt, x.T @ x, allowed)
    assert not torch.equal(refined, first)
    for row in refined:
        bases = [row.min() / m for m in allowed]
        assert any(
            all(any(torch.equal(base * m, scale) and torch.equal(scale / m, base) for m in allowed) for scale in row)
            for base in bases
        )


def test_scales_keep_short_significands() -> None:
    x = _inputs()
    refined = refine_scales(
        _weight(), choose_scales(_weight(), get_format("e2m1"), GROUP, "mse"), get_format("e2m1"), x.T @ x
    )
    assert not bool((refined.view(torch.int32) & 0xF).any())


def test_a_row_of_zeros_keeps_its_scales_and_exact_weights_stay_exact() -> None:
    fmt = get_format("e2m1")
    weight = torch.tensor(fmt.values)[torch.arange(ROWS * COUNT) % 16].reshape(ROWS, COUNT) * 0.25
    weight[3] = 0.0
    first = torch.full((ROWS, COUNT // GROUP), 0.25)
    first[3] = ZERO_GROUP_SCALE
    x = _inputs()
    assert torch.equal(refine_scales(weight, first, fmt, x.T @ x), first)
    assert torch.equal(refine_scales(weight, first, fmt, x.T @ x, (1, 2, 3)), first)


def test_unit_of_weights_and_inputs_changes_nothing() -> None:
    fmt, weight, x = get_format("e2m1"), _weight(), _inputs()
    first = choose_scales(weight, fmt, GROUP, "mse")
    refined = refine_scales(weight, first, fmt, x.T @ x)
    again = refine_scales(weight * 2.0**-40, first * 2.0**-40, fmt, x.T @ x * 2.0**40)
    assert torch.equal(again, refined * 2.0**-40)


def test_dead_inputs_do_not_break_the_search() -> None:
    first = choose_scales(_weight(), get_format("e2m1"), GROUP, "mse")
    assert torch.equal(refine_scales(_weight(), first, get_format("e2m1"), torch.zeros(COUNT, COUNT)), first)


def test_scales_of_another_kind_are_refused() -> None:
    free = choose_scales(_weight(), get_format("e2m1"), GROUP, "mse")
    with pytest.raises(ValueError, match="not foldable"):
        refine_scales(_weight(), free, get_format("e2m1"), torch.eye(COUNT), (1, 2))


def test_only_the_search_by_output_looks_at_the_gram_matrix() -> None:
    fmt, weight, x = get_format("e2m1"), _weight(), _inputs()
    seen = InputStatistics(x.square().mean(0), float(x.abs().amax()), float(x.amin()), x.T @ x)
    by_diagonal = search_scales(weight, fmt, GROUP, "mse", seen)
    assert torch.equal(by_diagonal, choose_scales(weight, fmt, GROUP, "mse", seen.mean_square))
    assert torch.equal(search_scales(weight, fmt, GROUP, "output", replace(seen, gram=None)), by_diagonal)
    assert not torch.equal(search_scales(weight, fmt, GROUP, "output", seen), by_diagonal)
    assert torch.equal(search_scales(weight, fmt, GROUP, "absmax", seen), choose_scales(weight, fmt, GROUP, "absmax"))
