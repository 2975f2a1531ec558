"""Factors of low rank: the best there are, in numbers that FP16 holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exporter.transforms.low_rank import factorize

SHAPES = [(48, 32), (32, 48), (32, 32)]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_no_product_of_the_rank_is_nearer_to_the_weight(shape: tuple[int, int]) -> None:
    weight = randn(*shape)
    found = factorize(weight, 8)
    best = torch.linalg.svdvals(weight)[8:].square().sum()
    assert float(found.remainder(weight).square().sum()) == pytest.approx(float(best), rel=1e-4)


def test_factors_are_numbers_of_fp16_and_what_they_lack_is_left_over() -> None:
    weight = randn(24, 40)
    found = factorize(weight, 5)
    assert (found.up.shape, found.down.shape) == ((24, 5), (5, 40))
    for factor in (found.up, found.down):
        assert torch.equal(factor.half().float(), factor)
    torch.testing.assert_close(found.remainder(weight) + found.up @ found.down, weight)


def test_a_weight_of_the_rank_is_nearly_all_in_the_product() -> None:
    weight = randn(24, 3) @ randn(3, 40)
    assert float(factorize(weight, 3).remainder(weight).abs().max()) < 2e-3 * float(weight.abs().max())
