"""Sample grids as PNG data, for the report."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

_GAP = 2
_SMALLEST_TILE = 40
_LARGEST_TILE = 256
_FEWEST_COLUMNS = 5


@dataclass(frozen=True)
class SampleGrids:
    """Two PNGs as data URIs, tile for tile from the same noise and prompt, what is shown of the samples if that needs
    saying, and how many tiles a row has."""

    original: str
    quantized: str
    caption: str
    columns: int


def sample_grids(original: Tensor, quantized: Tensor, columns: int | None = None) -> SampleGrids:
    """Lay out samples [n, C, H, W] of both models.

    One channel is shown in gray and three in colour, both from -1 to 1; other counts are latents, of which the first
    three channels (or the first) are shown between the original's 1st and 99th percentile, the same for both models.
    """
    channels = original.shape[1]
    if channels in (1, 3):
        low, high, caption = np.array([-1.0]), np.array([1.0]), ""
    else:
        shown = 3 if channels > 3 else 1
        original, quantized = original[:, :shown], quantized[:, :shown]
        flat = original.numpy(force=True).transpose(1, 0, 2, 3).reshape(shown, -1)
        low, high = np.percentile(flat, [1, 99], axis=1)
        what = "first three channels" if shown == 3 else "first channel"
        caption = f"latents, not images: the {what} of {channels}"
    if columns is None:
        columns = max(_FEWEST_COLUMNS, math.isqrt(len(original)))
    columns = min(columns, len(original))
    return SampleGrids(
        original=_data_uri(_grid(_tiles(original, low, high), columns)),
        quantized=_data_uri(_grid(_tiles(quantized, low, high), columns)),
        caption=caption,
        columns=columns,
    )


def _tiles(samples: Tensor, low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Opaque RGBA tiles [n, H, W, 4], small ones enlarged pixel by pixel, large ones thinned out."""
    span = np.maximum(high - low, 1e-12)
    pixels = samples.numpy(force=True).astype(np.float64).transpose(0, 2, 3, 1)
    scaled = np.clip(np.nan_to_num((pixels - low) / span), 0, 1)
    gray = np.rint(scaled * 255).astype(np.uint8)
    rgb = gray if gray.shape[-1] == 3 else np.repeat(gray[..., :1], 3, axis=-1)
    side = max(rgb.shape[1:3])
    factor, stride = max(1, -(-_SMALLEST_TILE // side)), max(1, -(-side // _LARGEST_TILE))
    rgb = rgb[:, ::stride, ::stride].repeat(factor, axis=1).repeat(factor, axis=2)
    return np.concatenate([rgb, np.full((*rgb.shape[:3], 1), 255, np.uint8)], axis=-1)


def _grid(tiles: npt.NDArray[np.uint8], columns: int) -> npt.NDArray[np.uint8]:
    """One RGBA image [H, W, 4], row by row, with transparent gaps."""
    count, height, width, _ = tiles.shape
    rows = -(-count // columns)
    grid = np.zeros((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 4), np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + _GAP), index % columns * (width + _GAP)
        grid[top : top + height, left : left + width] = tile
    return grid


def _data_uri(image: npt.NDArray[np.uint8]) -> str:
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(image).save(png, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
