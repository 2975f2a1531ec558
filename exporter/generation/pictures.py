"""Generated tensors as PNG files, and the same-seed comparison of the original and the exported model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from exporter.files import atomic_path

PIXEL_CHANNELS = (1, 3)
"""Channels of a model that draws pixels; with any other number it draws latents."""

_SMALLEST_TILE = 96
_LARGEST_TILE = 512
_GAP = 8
_LINE = 20
_FONT_SIZE = 12
_WIDEST = 2048
_INK, _PAPER = (20, 20, 20), (255, 255, 255)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Kind:
    """What generated tensors are, and the range in which they are shown.

    `low` and `high` are [C'] per shown channel; the first C' channels are shown. `caption` says what is shown if that
    is not the image itself.
    """

    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    caption: str = ""

    @property
    def is_image(self) -> bool:
        """Whether the tensors are images and not latents."""
        return not self.caption

    @property
    def measure(self) -> str:
        """What `psnr` is of such tensors."""
        return "PSNR" if self.is_image else "SNR"

    def pixels(self, samples: Tensor) -> Pixels:
        """8-bit RGB pixels [n, H, W, 3] of finite samples."""
        values = samples[:, : len(self.low)].numpy(force=True).astype(np.float64).transpose(0, 2, 3, 1)
        scaled = np.clip((values - self.low) / np.maximum(self.high - self.low, 1e-12), 0, 1)
        gray = np.rint(scaled * 255).astype(np.uint8)
        return gray if gray.shape[-1] == 3 else np.repeat(gray[..., :1], 3, axis=-1)


def kind_of(samples: Tensor, *, decoded: bool) -> Kind:
    """Decoded images are RGB from 0 to 1; a model of `PIXEL_CHANNELS` draws them from -1 to 1; the rest are latents.

    Latents are shown by their first three channels (or the first) between the 1st and 99th percentile of `samples`.
    """
    channels = samples.shape[1]
    if decoded:
        return Kind(np.zeros(channels), np.ones(channels))
    if channels in PIXEL_CHANNELS:
        return Kind(np.full(channels, -1.0), np.ones(channels))
    shown = 3 if channels > 3 else 1
    flat = samples[:, :shown].numpy(force=True).transpose(1, 0, 2, 3).reshape(shown, -1)
    low, high = np.percentile(flat, [1, 99], axis=1)
    what = "first three channels" if shown == 3 else "first channel"
    return Kind(low, high, f"latents, not images: the {what} of {channels}")


def psnr(original: Tensor, other: Tensor, kind: Kind) -> float:
    """Peak signal-to-noise ratio in dB of two tensors [C, H, W] of one kind, each clipped to its range; inf if equal.

    Of latents, whose range has no end, the signal-to-noise ratio.
    """
    first, second = (sample.numpy(force=True).astype(np.float64) for sample in (original, other))
    if not kind.is_image:
        noise = float(np.square(first - second).mean())
        return _decibel(float(np.square(first).mean()), noise)
    low, high = kind.low[:, None, None], kind.high[:, None, None]
    first, second = (np.clip((array - low) / (high - low), 0, 1) for array in (first, second))
    return _decibel(1.0, float(np.square(first - second).mean()))


def _decibel(signal: float, noise: float) -> float:
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def save_png(pixels: Pixels, path: Path) -> None:
    """Write one picture [H, W, 3], whole or not at all."""
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", optimize=True)


def contact_sheet(tiles: Pixels) -> Pixels:
    """All tiles [n, H, W, 3] in one picture, small ones enlarged pixel by pixel; a single one as it is."""
    if len(tiles) == 1:
        return np.asarray(tiles[0])
    sized = [_resized(tile) for tile in tiles]
    side, tall = sized[0].width + _GAP, sized[0].height + _GAP
    columns = min(len(sized), max(1, min(math.ceil(math.sqrt(len(sized))), (_WIDEST - _GAP) // side)))
    sheet = Image.new("RGB", (columns * side + _GAP, -(-len(sized) // columns) * tall + _GAP), _PAPER)
    for index, tile in enumerate(sized):
        sheet.paste(tile, (_GAP + index % columns * side, _GAP + index // columns * tall))
    return np.asarray(sheet)


def comparison(original: Pixels, other: Pixels, names: tuple[str, str], labels: Sequence[str], caption: str) -> Pixels:
    """Pairs of tiles [n, H, W, 3] side by side, `names` above and a label under each pair, `caption` at the foot."""
    pairs = [(_resized(first), _resized(second)) for first, second in zip(original, other, strict=True)]
    tile_width, tile_height = pairs[0][0].size
    cell = (2 * tile_width + 3 * _GAP, tile_height + 2 * _LINE + _GAP)
    columns = max(1, min(len(pairs), _WIDEST // cell[0], math.ceil(math.sqrt(len(pairs) / 2))))
    rows = -(-len(pairs) // columns)
    font = ImageFont.load_default(_FONT_SIZE)
    width = max(columns * cell[0] + _GAP, math.ceil(font.getlength(caption)) + 2 * _GAP if caption else 0)
    sheet = Image.new("RGB", (width, rows * cell[1] + (_LINE + _GAP if caption else 0)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, ((first, second), label) in enumerate(zip(pairs, labels, strict=True)):
        left, top = index % columns * cell[0] + _GAP, index // columns * cell[1] + _GAP // 2
        for tile, name, x in ((first, names[0], left), (second, names[1], left + tile_width + _GAP)):
            draw.text((x, top), _fitted(name, tile_width, draw, font), fill=_INK, font=font)
            sheet.paste(tile, (x, top + _LINE))
        draw.text((left, top + _LINE + tile_height + 2), label, fill=_INK, font=font)
    draw.text((_GAP, rows * cell[1] + _GAP // 2), caption, fill=_INK, font=font)
    return np.asarray(sheet)


def _fitted(
    text: str, width: int, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    """The text, its end cut off where it would run into the next tile's."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(f"{text}…", font=font) > width:
        text = text[:-1]
    return f"{text}…"


def _resized(tile: Pixels) -> Image.Image:
    """A tile large enough to see and small enough to show."""
    image = Image.fromarray(tile)
    side = max(image.size)
    if side < _SMALLEST_TILE:
        factor = -(-_SMALLEST_TILE // side)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if side > _LARGEST_TILE:
        size = (image.width * _LARGEST_TILE // side, image.height * _LARGEST_TILE // side)
        return image.resize(size, Image.Resampling.LANCZOS)
    return image
