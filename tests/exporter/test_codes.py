"""Codes by tables are the formats' own, on every value, every midpoint and what lies next to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exporter.codes import encode_grid_values, nearest_codes
from plugins.formats import WEIGHT_FORMATS, get_format


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_values_of_the_grid_are_encoded_without_a_search_to_the_same_codes(name: str) -> None:
    fmt = get_format(name)
    values = torch.from_numpy(fmt.values[fmt.valid].copy()).add_(0.0)
    assert np.array_equal(encode_grid_values(values, fmt).numpy(), fmt.encode(values.numpy()))


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_nearest_codes_are_those_of_the_rounded_values(name: str) -> None:
    fmt = get_format(name)
    grid = np.unique(fmt.values[fmt.valid])
    places = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, [2 * fmt.max, -2 * fmt.max, 0.0, -0.0]])
    places = places.astype(np.float32)
    noise = np.random.default_rng(0).normal(scale=fmt.max / 3, size=10_000).astype(np.float32)
    below, above = (np.nextafter(places, np.float32(end)) for end in (-np.inf, np.inf))
    values = np.concatenate([places, below, above, noise])
    before = values.copy()
    codes = nearest_codes(torch.from_numpy(values), fmt).numpy()
    assert np.array_equal(codes, fmt.encode(fmt.round(before) + np.float32(0.0)))
    assert np.array_equal(values, before)
