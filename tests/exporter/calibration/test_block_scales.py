"""Scales of blocks: representable, positive, and no worse than what they are searched around."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from exporter.calibration.block_scales import choose_block_scales, static_scale
from exporter.quantize import round_to_nearest
from plugins.block_scales import BLOCK_SCALINGS, BlockScaling, factor_scales, tensor_scale_of

SCALINGS = pytest.mark.parametrize("scaling", BLOCK_SCALINGS.values(), ids=BLOCK_SCALINGS)


def weight(rows: int = 48, count: int = 128, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, count, generator=generator) * torch.logspace(-1, 1, count)


def error(w: Tensor, scales: Tensor, scaling: BlockScaling, importance: Tensor | None = None) -> Tensor:
    """Per group."""
    deviation = round_to_nearest(w, scales, scaling.values).dequantize(scaling.values) - w
    weighted = deviation.square() * (torch.ones(w.shape[1]) if importance is None else importance)
    return weighted.reshape(len(w), -1, scaling.group_size).sum(dim=2)


@SCALINGS
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_scales_are_ones_that_ship(scaling: BlockScaling, search: str) -> None:
    scales = choose_block_scales(weight(), scaling, search)  # type: ignore[arg-type]
    assert scales.shape == (48, 128 // scaling.group_size)
    factors = factor_scales(scales.numpy(), scaling)
    assert factors is not None
    assert np.array_equal(scaling.scales.decode(factors[1]) * factors[0], scales.numpy())


@SCALINGS
def test_the_search_only_improves(scaling: BlockScaling) -> None:
    w = weight()
    plain, searched = (error(w, choose_block_scales(w, scaling, name), scaling) for name in ("absmax", "mse"))
    assert (searched <= plain * (1 + 1e-5)).all()
    # Powers of two leave nothing to gain: half the scale saturates, twice the scale rounds coarser.
    gains = scaling.name == "nvfp4"
    assert (searched.sum() < plain.sum() * 0.95) == gains


@SCALINGS
def test_the_search_finds_the_best_of_all_representable_scales(scaling: BlockScaling) -> None:
    w = weight(4, 32)
    chosen = choose_block_scales(w, scaling, "mse")
    whole = static_scale(float(w.abs().max()), scaling).item() if scaling.has_tensor_scale else 1.0
    every = torch.stack(
        [error(w, torch.full_like(chosen, float(v) * whole), scaling) for v in scaling.grid if 1e-9 < v < 1e9]
    )
    assert torch.allclose(error(w, chosen, scaling), every.amin(dim=0), rtol=1e-4)


def test_importance_decides() -> None:
    scaling = BLOCK_SCALINGS["nvfp4"]
    w = weight()
    importance = torch.where(torch.arange(128) % 16 == 0, 1.0, 1e-6)
    told = choose_block_scales(w, scaling, "mse", importance)
    assert (
        error(w, told, scaling, importance).sum()
        < error(w, choose_block_scales(w, scaling, "mse"), scaling, importance).sum()
    )


@SCALINGS
def test_zeros_have_positive_scales(scaling: BlockScaling) -> None:
    w = weight()
    w[:, :32] = 0
    for zeros in (w, torch.zeros(3, 64)):
        scales = choose_block_scales(zeros, scaling, "mse")
        assert bool((scales > 0).all() and scales.isfinite().all())
        assert factor_scales(scales.numpy(), scaling) is not None


def test_a_static_scale_spans_the_range_and_keeps_products_exact() -> None:
    scaling = BLOCK_SCALINGS["nvfp4"]
    scale = static_scale(123.456, scaling)
    assert scale.shape == ()
    assert scale.item() == pytest.approx(tensor_scale_of(123.456, scaling), rel=2**-19)
    exact = scaling.grid.astype(np.float64) * float(scale)
    assert np.array_equal(exact, (scaling.grid * np.float32(scale.item())).astype(np.float64))
    assert static_scale(0.0, scaling).item() > 0


def test_groups_must_divide_the_row() -> None:
    with pytest.raises(ValueError, match="groups of 16 do not divide rows of 40"):
        choose_block_scales(torch.zeros(2, 40), BLOCK_SCALINGS["nvfp4"], "mse")
