"""Pixels, PSNR and sheets of generated tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from exporter.generation.pictures import comparison, contact_sheet, kind_of, psnr


def test_ranges_of_the_three_kinds() -> None:
    decoded = kind_of(torch.rand(2, 3, 4, 4), decoded=True)
    assert decoded.is_image
    assert decoded.pixels(torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1)).tolist() == [[[[0, 128, 255]]]]
    drawn = kind_of(torch.zeros(1, 1, 2, 2), decoded=False)
    assert drawn.pixels(torch.tensor([-1.0, 3.0]).reshape(1, 1, 1, 2)).tolist() == [[[[0] * 3, [255] * 3]]]
    latents = kind_of(torch.randn(2, 4, 8, 8), decoded=False)
    assert not latents.is_image
    assert latents.caption == "latents, not images: the first three channels of 4"
    assert latents.pixels(torch.full((1, 4, 2, 2), 1e6)).min() == 255


def test_psnr_counts_the_range_that_is_shown() -> None:
    drawn = kind_of(torch.zeros(1, 1, 2, 2), decoded=False)
    first = torch.zeros(1, 4, 4)
    assert psnr(first, first + 0.02, drawn) == pytest.approx(40.0, abs=0.01)
    assert psnr(first + 1, first + 5, drawn) == math.inf
    latents = kind_of(torch.randn(2, 4, 8, 8), decoded=False)
    base = torch.full((4, 8, 8), 2.0)
    assert psnr(base, base + 0.2, latents) == pytest.approx(20.0, abs=0.01)


def test_sheets_hold_every_tile() -> None:
    tiles = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((5, 100, 100, 3), 50, np.uint8)
    assert np.array_equal(contact_sheet(tiles[:1]), tiles[0])
    for sheet in (contact_sheet(tiles), comparison(tiles, tiles, ("a", "b"), ["label"] * 5, "")):
        assert {0, 50, 100, 150, 200, 255} <= set(np.unique(sheet).tolist())
    caption = "latents, not images: the first three channels of 4"
    narrow = comparison(tiles[:1, :4, :4], tiles[:1, :4, :4], ("a", "b"), ["label"], caption)
    assert narrow[-20:, -8:].min() > 240, "the caption ends before the sheet does"
    large = comparison(
        np.zeros((1, 2048, 1024, 3), np.uint8), np.zeros((1, 2048, 1024, 3), np.uint8), ("a" * 99, "b"), [""], "c"
    )
    assert large.shape[0] < 600
