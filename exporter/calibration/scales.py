"""Choose the scales of a weight: per channel, per group, or per group but foldable into one scale per channel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from exporter.rounding import power_of_two_below, round_to_format
from plugins.formats import Format

ScaleSearch = Literal["absmax", "mse"]

SIGNIFICAND_BITS = 20
FLOAT32_SIGNIFICAND_BITS = 24
# An all-zero group may have any scale; this one is positive and normal in half precision too.
ZERO_GROUP_SCALE = 2.0**-14
# Keeps weight / scale away from float32's subnormals.
SMALLEST_SCALE = 2.0**-100

# Scale candidates relative to absmax / max; the first is absmax itself, so a search never does worse. Those above 1
# let absmax meet a smaller value: where values are sparse near the top, as 4 and 6 are in E2M1, that often pays.
_CLIPPINGS = (1.0, *(1.6 * 2.0 ** (-step / 32) for step in range(56)))
_CANDIDATES_PER_OCTAVE = 10
_REFINEMENTS = tuple(0.94 + 0.015 * step for step in range(9))
_ELEMENTS_AT_ONCE = 1 << 18


def round_significand(scales: Tensor, bits: int = SIGNIFICAND_BITS) -> Tensor:
    """Round positive normal float32 `scales` to `bits` significand bits, to nearest with ties away from zero."""
    dropped = FLOAT32_SIGNIFICAND_BITS - bits
    raised = scales.contiguous().view(torch.int32) + (1 << (dropped - 1))
    return (raised & -(1 << dropped)).view(torch.float32)


def choose_scales(
    weight: Tensor,
    fmt: Format,
    group_size: int,
    search: ScaleSearch,
    importance: Tensor | None = None,
    multipliers: Sequence[int] = (),
) -> Tensor:
    """Return scales float32 [N, G] for `weight` [N, K]: G = K / `group_size`, or 1 when `group_size` is 0.

    "absmax" lets the largest magnitude of a group meet the format's largest value. "mse" minimises, over a grid of
    clippings, the squared rounding error weighted by `importance` [K]: the mean square of each input channel, i.e.
    the diagonal of the layer's Gram matrix, so that the sum estimates the error of the layer's output.

    With `multipliers` (ascending integers) the scales are foldable: one scale s per row and one multiplier m per
    group, and scale = s·m and scale / m = s hold exactly in float32, for s has at most 20 significand bits. So have
    scales without multipliers. All are positive. Raises `ValueError` where the group does not divide K.
    """
    count = weight.shape[1]
    size = group_size or count
    if count % size:
        raise ValueError(f"groups of {size} do not divide rows of {count} weights")
    if importance is None:
        importance = torch.ones(count, device=weight.device)
    # Only ratios count: a mean of 1 keeps the sums in range whatever the activations' unit.
    importance = importance / importance.mean().clamp_min(SMALLEST_SCALE)
    chosen = [
        _choose_rows(part, fmt, size, search, importance, tuple(multipliers))
        for part in torch.split(weight, max(1, _ELEMENTS_AT_ONCE // count))
    ]
    return torch.cat(chosen)


def _choose_rows(
    weight: Tensor, fmt: Format, size: int, search: ScaleSearch, importance: Tensor, allowed: tuple[int, ...]
) -> Tensor:
    """Choose scales [n, G] for a few rows [n, K], computing in units of each row's power of two."""
    unit = power_of_two_below(weight.abs().amax(dim=1, keepdim=True)).clamp_(min=SMALLEST_SCALE)
    grouped = (weight / unit).reshape(len(weight), -1, size)
    importance = importance.reshape(-1, size)
    groups = grouped.shape[1]
    if len(allowed) == 1:  # one multiplier only: a channel scale, said G times
        grouped, importance = grouped.reshape(len(weight), 1, -1), importance.reshape(1, -1)
    amax = grouped.abs().amax(dim=2)
    wanted = (amax / torch.full_like(amax, fmt.max)).clamp_min(SMALLEST_SCALE)
    if search == "mse":
        wanted = _search_clipping(grouped, fmt, wanted, importance)
    if len(allowed) > 1:
        wanted = torch.where(amax == 0, wanted.amax(dim=1, keepdim=True), wanted)
        chosen = _fold(grouped, fmt, wanted, allowed, importance) * unit
        zero = (amax == 0).all(dim=1, keepdim=True)
    else:
        chosen, zero = round_significand(wanted) * unit, amax == 0
    return torch.where(zero, ZERO_GROUP_SCALE, chosen.clamp_min(SMALLEST_SCALE)).expand(-1, groups)


def _rounding_error(grouped: Tensor, fmt: Format, scales: Tensor, importance: Tensor) -> Tensor:
    """Return the importance-weighted squared error [n, G] of rounding [n, G, g] on `scales` [n, G]."""
    scales = scales.unsqueeze(2)
    error = round_to_format(grouped / scales, fmt).mul_(scales).sub_(grouped).square_()
    return error.mul_(importance).sum(dim=2)


def _search_clipping(grouped: Tensor, fmt: Format, absmax: Tensor, importance: Tensor) -> Tensor:
    """Return the scales [n, G] of least weighted error among `absmax` times the clippings."""
    best, least = absmax, torch.full_like(absmax, torch.inf)
    for clipping in _CLIPPINGS:
        candidate = round_significand((absmax * clipping).clamp_min_(SMALLEST_SCALE))
        error = _rounding_error(grouped, fmt, candidate, importance)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best


def _fold(grouped: Tensor, fmt: Format, wanted: Tensor, allowed: tuple[int, ...], importance: Tensor) -> Tensor:
    """Replace the `wanted` group scales [n, G] by s·m, s per row and m in `allowed`, of least weighted error."""
    # From the row whose largest scale takes the largest multiplier to the one where it takes the smallest.
    largest, octaves = wanted.amax(dim=1, keepdim=True) / allowed[-1], math.log2(allowed[-1] / allowed[0])
    count = round(octaves * _CANDIDATES_PER_OCTAVE)
    candidates = [largest * 2 ** (octaves * step / count) for step in range(count + 1)]
    channel, _ = _best_channel(grouped, fmt, wanted, allowed, importance, candidates)
    refined = [channel * factor for factor in _REFINEMENTS]
    _, scales = _best_channel(grouped, fmt, wanted, allowed, importance, [channel, *refined])
    return scales


def _best_channel(
    grouped: Tensor,
    fmt: Format,
    wanted: Tensor,
    allowed: tuple[int, ...],
    importance: Tensor,
    candidates: Iterable[Tensor],
) -> tuple[Tensor, Tensor]:
    """Among candidate row scales [n, 1] return the best one and the group scales [n, G] it gives."""
    # A scale and its multiplier share float32's 24 bits, so that neither s·m nor (s·m)/m rounds.
    widest = max((multiplier // (multiplier & -multiplier)).bit_length() for multiplier in allowed)
    bits = min(SIGNIFICAND_BITS, FLOAT32_SIGNIFICAND_BITS - widest)
    steps = torch.tensor(allowed, dtype=torch.float32, device=grouped.device)
    least = torch.full_like(wanted[:, :1], torch.inf)
    best, best_scales = torch.zeros_like(least), wanted
    for candidate in candidates:
        channel = round_significand(candidate.clamp_min(SMALLEST_SCALE), bits)
        scales, error = _best_multipliers(grouped, fmt, wanted, steps, importance, channel)
        better = error < least
        best, least = torch.where(better, channel, best), torch.where(better, error, least)
        best_scales = torch.where(better, scales, best_scales)
    return best, best_scales


def _best_multipliers(
    grouped: Tensor, fmt: Format, wanted: Tensor, steps: Tensor, importance: Tensor, channel: Tensor
) -> tuple[Tensor, Tensor]:
    """Per group try the multiplier nearest to wanted / channel and its neighbours: (scales [n, G], error [n, 1])."""
    nearest = (steps - (wanted / channel).unsqueeze(2)).abs().argmin(dim=2)
    best, least = wanted, torch.full_like(wanted, torch.inf)
    for neighbour in (0, -1, 1):
        scales = channel * steps[(nearest + neighbour).clamp(0, len(steps) - 1)]
        error = _rounding_error(grouped, fmt, scales, importance)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best, least.sum(dim=1, keepdim=True)
