"""The scales of weights in blocks: chosen among the values that a scale format has, since those are what ships."""

from __future__ import annotations

import torch
from torch import Tensor

from exporter.calibration.scales import (
    SMALLEST_SCALE,
    ZERO_GROUP_SCALE,
    RoundingError,
    ScaleSearch,
    better,
    round_significand,
    rows_at_once,
)
from exporter.cores import one_thread
from plugins.block_scales import BlockScaling, tensor_scale_of


def static_scale(amax: float, scaling: BlockScaling) -> Tensor:
    """A tensor's own scale, float32 []: amax / (max value · max scale), rounded to 20 bits and positive.

    With so few bits its product with any scale is exact. A tensor of zeros may have any scale.
    """
    exact = torch.tensor(max(tensor_scale_of(amax, scaling), SMALLEST_SCALE) if amax else ZERO_GROUP_SCALE)
    return round_significand(exact.reshape(1)).reshape(())


def choose_block_scales(
    weight: Tensor, scaling: BlockScaling, search: ScaleSearch, importance: Tensor | None = None
) -> Tensor:
    """Return scales float32 [N, K/G] for `weight` [N, K], each a positive value of the scale format (times the
    weight's own scale where the scaling has one), so that they ship as they are.

    "absmax": the group's largest magnitude over the largest value, rounded to nearest (E4M3) or up (E8M0), but never to
    zero. "mse": of all representable scales within an octave of that, the one with the least squared error weighted by
    `importance` [K], as for other scales. Raises `ValueError` where the groups do not divide K.
    """
    count = weight.shape[1]
    if count % scaling.group_size:
        raise ValueError(f"groups of {scaling.group_size} do not divide rows of {count} weights")
    if importance is None:
        importance = torch.ones(count, device=weight.device)
    importance = (importance / importance.mean().clamp_min(SMALLEST_SCALE)).reshape(-1, scaling.group_size)
    whole = torch.ones(()) if not scaling.has_tensor_scale else static_scale(float(weight.abs().max()), scaling)
    grid = torch.from_numpy(scaling.grid.copy()).mul_(whole)
    grid = grid[grid >= SMALLEST_SCALE].to(weight.device)
    with one_thread():
        parts = torch.split(weight, rows_at_once(weight))
        return torch.cat([_choose_rows(part, scaling, grid, search, importance) for part in parts])


def _choose_rows(
    weight: Tensor, scaling: BlockScaling, grid: Tensor, search: ScaleSearch, importance: Tensor
) -> Tensor:
    """Scales [n, K/G] out of `grid` (ascending) for a few rows [n, K]."""
    grouped = weight.abs().reshape(len(weight), -1, scaling.group_size)
    amax = grouped.amax(dim=2)
    wanted = amax / torch.full_like(amax, scaling.values.max)
    nearest = _index(wanted, grid, round_up=not scaling.has_tensor_scale)
    if search == "absmax":
        return grid[nearest]
    error = RoundingError(grouped, scaling.values, importance)
    best, least = grid[nearest], error(grid[nearest])
    per_octave = 2**scaling.scales.mantissa_bits
    for step in range(-per_octave, per_octave + 1):
        candidate = grid[(nearest + step).clamp(0, len(grid) - 1)]
        best, least = better(best, least, candidate, error(candidate))
    return best


def _index(wanted: Tensor, grid: Tensor, *, round_up: bool) -> Tensor:
    """Which of `grid` is nearest to, or not below, each wanted scale; the first or last one beyond its ends."""
    boundaries = grid[:-1] if round_up else (grid[:-1] + grid[1:]) / 2
    return torch.bucketize(wanted, boundaries)
