"""Sample grids show every sample once, both models on the same scale."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from exporter.images import sample_grids


def pixels(uri: str) -> np.ndarray:
    head, data = uri.split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_gray_tiles_are_enlarged_and_in_order() -> None:
    samples = torch.linspace(-1, 1, 6).reshape(6, 1, 1, 1).expand(6, 1, 8, 8)
    grids = sample_grids(samples, -samples)
    assert (grids.columns, grids.caption) == (5, "")
    first, second = pixels(grids.original), pixels(grids.quantized)
    assert first.shape == second.shape == (2 * 40 + 2, 5 * 40 + 4 * 2, 4)
    assert [first[20, 20 + 42 * column, 0] for column in range(5)] == [0, 51, 102, 153, 204]
    assert first[62, 20, 0] == 255
    assert second[20, 20, 0] == 255
    # Gaps, and the places after the last sample, let the page shine through.
    assert first[20, 41, 3] == first[62, 20 + 42, 3] == 0


def test_colour_is_clipped_to_its_range() -> None:
    samples = torch.tensor([3.0, 0.0, -3.0]).reshape(1, 3, 1, 1).expand(1, 3, 50, 50)
    grids = sample_grids(samples, samples, columns=3)
    image = pixels(grids.original)
    assert image.shape == (50, 50, 4)
    assert image[0, 0].tolist() == [255, 128, 0, 255]


@pytest.mark.parametrize(("channels", "named"), [(4, "first three channels of 4"), (2, "first channel of 2")])
def test_latents_share_the_originals_scale_and_say_so(channels: int, named: str) -> None:
    original = torch.randn(4, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    grids = sample_grids(original, original * 0.5)
    assert named in grids.caption
    spread, narrow = (pixels(uri)[:16, :16, :3].astype(float).std() for uri in (grids.original, grids.quantized))
    assert narrow < 0.7 * spread


def test_large_samples_are_thinned_out_and_nan_is_drawn() -> None:
    samples = torch.full((1, 1, 512, 512), torch.nan)
    assert pixels(sample_grids(samples, samples).quantized).shape == (256, 256, 4)
