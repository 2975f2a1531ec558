"""Codes of many values at once, by tables: what `plugins.formats` gives, without its search."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exporter.rounding import round_to_format
from plugins.formats import Format

# Formats with more steps up to their largest value are encoded by search instead of by table.
_LARGEST_TABLE = 1 << 12


def encode_grid_values(values: Tensor, fmt: Format) -> Tensor:
    """Codes uint8 of float32 `values` that lie on the format's grid."""
    if fmt.max_numerator > _LARGEST_TABLE:
        return torch.from_numpy(fmt.encode(values.numpy()))
    largest = fmt.max_numerator
    numerators = np.arange(-largest, largest + 1, dtype=np.float64)
    table = torch.from_numpy(fmt.encode((numerators * fmt.step).astype(np.float32)))
    indices = (values / fmt.step).to(torch.int32).add_(largest)
    return table.index_select(0, indices.flatten()).view(values.shape)


def nearest_codes(values: Tensor, fmt: Format) -> Tensor:
    """Codes uint8 of the nearest values on the format's grid, ties to the even code; zeros are positive.

    Where rounding changes its mind lies a multiple of half the smallest step. So a table with an entry for every such
    multiple, and one for what lies between two, has all answers: both neighbours' sum is the place in it.
    """
    if fmt.max_numerator > _LARGEST_TABLE:
        return encode_grid_values(round_to_format(values, fmt).add_(0.0).cpu(), fmt)
    halves = values.clamp(-fmt.max, fmt.max).mul_(2 / fmt.step)
    places = halves.floor().add_(halves.ceil_()).to(torch.int32).add_(4 * fmt.max_numerator)
    table = torch.from_numpy(_codes_of_quarters(fmt)).to(values.device)
    return table.index_select(0, places.flatten()).view(values.shape)


@cache
def _codes_of_quarters(fmt: Format) -> npt.NDArray[np.uint8]:
    """Codes of all multiples of a quarter of the smallest step, from the smallest value to the largest."""
    count = 4 * fmt.max_numerator
    quarters = (np.arange(-count, count + 1) * (fmt.step / 4)).astype(np.float32)
    return fmt.encode(fmt.round(quarters) + np.float32(0.0))
