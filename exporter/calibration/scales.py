"""Choose the scales of a weight: per channel, per group, or per group but foldable into one scale per channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from exporter.cores import one_thread
from exporter.rounding import power_of_two_below, round_to_format
from plugins.formats import Format

ScaleSearch = Literal["absmax", "mse"]

SIGNIFICAND_BITS = 20
FLOAT32_SIGNIFICAND_BITS = 24
# An all-zero group may have any scale; this one is positive and normal in half precision too.
ZERO_GROUP_SCALE = 2.0**-14
# Keeps weight / scale away from float32's subnormals.
SMALLEST_SCALE = 2.0**-100

# Candidate scales are absmax / max times powers of two with these exponents. Those above 0 let absmax meet a smaller
# value: where values are sparse near the top, as 4 and 6 are in E2M1, that often pays.
_PER_OCTAVE = 16
_LOWEST, _HIGHEST = -1.0, 0.75
# Foldable scales also land far above a group's own, where few multipliers are small enough; coarser there.
_FAR_PER_OCTAVE = 4
_FARTHEST = 4.5
_REFINEMENTS = (0.97, 0.985, 1.015, 1.03)
# So few that they stay in a CPU's cache, so many that layers in other threads need not wait for Python's lock; enough
# to keep a GPU busy.
_ELEMENTS_IN_CACHE, _ELEMENTS_ON_GPU = 1 << 19, 1 << 22


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
    group. "absmax" then takes the s whose largest multiplier just holds the row, and the smallest m that holds the
    group; "mse" searches both. scale = s·m and scale / m = s hold exactly in float32, for s has at most 20 significand
    bits, as scales without multipliers have. All are positive. Raises `ValueError` where the group does not divide K.
    """
    count = weight.shape[1]
    size = group_size or count
    if count % size:
        raise ValueError(f"groups of {size} do not divide rows of {count} weights")
    if importance is None:
        importance = torch.ones(count, device=weight.device)
    # Only ratios count: a mean of 1 keeps the sums in range whatever the activations' unit.
    importance = importance / importance.mean().clamp_min(SMALLEST_SCALE)
    with one_thread():
        chosen = [
            _choose_rows(part, fmt, size, search, importance, tuple(multipliers))
            for part in torch.split(weight, rows_at_once(weight))
        ]
    return torch.cat(chosen)


def rows_at_once(weight: Tensor) -> int:
    """How many rows of `weight` [N, K] are searched at once, on its device."""
    elements = _ELEMENTS_IN_CACHE if weight.device.type == "cpu" else _ELEMENTS_ON_GPU
    return max(1, elements // weight.shape[1])


def channel_bits(multipliers: Sequence[int]) -> int:
    """How many significand bits a channel scale s may have: s and m share float32's 24, so that neither s·m nor
    (s·m)/m rounds."""
    widest = max((multiplier // (multiplier & -multiplier)).bit_length() for multiplier in multipliers)
    return min(SIGNIFICAND_BITS, FLOAT32_SIGNIFICAND_BITS - widest)


def _choose_rows(
    weight: Tensor, fmt: Format, size: int, search: ScaleSearch, importance: Tensor, allowed: tuple[int, ...]
) -> Tensor:
    """Choose scales [n, G] for a few rows [n, K], computing in units of each row's power of two."""
    groups = weight.shape[1] // size
    if len(allowed) == 1:  # one multiplier only: a channel scale, said G times
        size = weight.shape[1]
    magnitudes = weight.abs().reshape(len(weight), -1, size)
    amax = magnitudes.amax(dim=2)
    unit = power_of_two_below(amax.amax(dim=1, keepdim=True)).clamp_(min=SMALLEST_SCALE)
    amax = amax / unit
    absmax = (amax / torch.full_like(amax, fmt.max)).clamp_(min=SMALLEST_SCALE)
    error = None
    # "absmax" needs no more of the weights than their largest.
    if search == "mse":
        error = RoundingError(magnitudes / unit.unsqueeze(2), fmt, importance.reshape(-1, size))
    zero = amax == 0
    if len(allowed) > 1:
        wanted = torch.where(zero, absmax.amax(dim=1, keepdim=True), absmax)
        chosen = _hold(wanted, allowed) if error is None else _fold(error, wanted, allowed)
        zero = zero.all(dim=1, keepdim=True)
    else:
        chosen = round_significand(absmax if error is None else _search_clipping(error, absmax))
    return torch.where(zero, ZERO_GROUP_SCALE, (chosen * unit).clamp_(min=SMALLEST_SCALE)).expand(-1, groups)


@dataclass(frozen=True)
class RoundingError:
    """The importance-weighted squared error of rounding magnitudes [n, G, g], importance [G, g], on given scales."""

    magnitudes: Tensor
    fmt: Format
    importance: Tensor

    def __call__(self, scales: Tensor) -> Tensor:
        """scales [n, G] → [n, G]."""
        scales = scales.unsqueeze(2)
        error = round_to_format(self.magnitudes / scales, self.fmt).mul_(scales).sub_(self.magnitudes)
        return error.square_().mul_(self.importance).sum(dim=2)


def better(best: Tensor, least: Tensor, candidate: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Put candidates where their error is below the least one so far."""
    better = error < least
    return torch.where(better, candidate, best), torch.where(better, error, least)


def _search_clipping(error: RoundingError, absmax: Tensor) -> Tensor:
    """Return the scales [n, G] of least error around `absmax`, which itself is a candidate."""
    best, least = absmax, error(absmax)
    for step in range(round(_LOWEST * _PER_OCTAVE), round(_HIGHEST * _PER_OCTAVE) + 1):
        candidate = round_significand(absmax * 2.0 ** (step / _PER_OCTAVE))
        best, least = better(best, least, candidate, error(candidate))
    for factor in _REFINEMENTS:
        candidate = round_significand(best * factor)
        best, least = better(best, least, candidate, error(candidate))
    return best


def _hold(absmax: Tensor, allowed: tuple[int, ...]) -> Tensor:
    """Return group scales s·m [n, G], m in `allowed`: as small as hold `absmax`, but for the rounding of s."""
    steps = torch.tensor(allowed, dtype=torch.float32, device=absmax.device)
    channel = round_significand(absmax.amax(dim=1, keepdim=True) / steps[-1], channel_bits(allowed))
    return channel * steps[torch.searchsorted(steps, absmax / channel).clamp_(max=len(allowed) - 1)]


def _fold(error: RoundingError, absmax: Tensor, allowed: tuple[int, ...]) -> Tensor:
    """Return group scales s·m [n, G], s per row and m in `allowed`, of least error summed over the row.

    Every group's error is tabulated over a range of scales, and all pairs of s and m are judged by the tables.
    """
    bits = channel_bits(allowed)
    steps = torch.tensor(allowed, dtype=torch.float32, device=absmax.device)
    table = _error_table(error, absmax)
    # From the channel scale whose largest multiplier gives the row's absmax to the one whose smallest does.
    largest, octaves = absmax.amax(dim=1, keepdim=True) / allowed[-1], math.log2(allowed[-1] / allowed[0])
    count = round((octaves + _HIGHEST - _LOWEST) * _PER_OCTAVE)
    best = steps[0] * absmax
    least, channel = torch.full_like(largest, torch.inf), largest
    for step in range(count + 1):
        candidate = round_significand(largest * 2.0 ** (_LOWEST + step / _PER_OCTAVE), bits)
        judged, chosen = _look_up(table, (candidate.unsqueeze(2) * steps / absmax.unsqueeze(2)).log2_()).min(dim=2)
        total = judged.sum(dim=1, keepdim=True)
        best = torch.where(total < least, steps[chosen], best)
        channel, least = better(channel, least, candidate, total)
    least = error(channel * best).sum(dim=1, keepdim=True)
    for factor in _REFINEMENTS:
        candidate = round_significand(channel * factor, bits)
        channel, least = better(channel, least, candidate, error(candidate * best).sum(dim=1, keepdim=True))
    return channel * best


def _error_table(error: RoundingError, absmax: Tensor) -> Tensor:
    """Return the errors [n, G, J] on the scales absmax·2^(_LOWEST + j / _PER_OCTAVE)."""
    near = range(round(_LOWEST * _PER_OCTAVE), round(_HIGHEST * _PER_OCTAVE) + 1)
    columns = [error(absmax * 2.0 ** (step / _PER_OCTAVE)) for step in near]
    between = _PER_OCTAVE // _FAR_PER_OCTAVE
    for step in range(round((_FARTHEST - _HIGHEST) * _FAR_PER_OCTAVE)):
        before = columns[-1]
        after = error(absmax * 2.0 ** (_HIGHEST + (step + 1) / _FAR_PER_OCTAVE))
        columns += [torch.lerp(before, after, (part + 1) / between) for part in range(between)]
    return torch.stack(columns, dim=2)


def _look_up(table: Tensor, exponents: Tensor) -> Tensor:
    """Interpolate the table [n, G, J] at the exponents [n, G, m]; below its range is as bad as can be."""
    position = (exponents - _LOWEST) * _PER_OCTAVE
    inside = position.clamp(0, table.shape[2] - 1.001)
    index = inside.long()
    found = torch.lerp(table.gather(2, index), table.gather(2, index + 1), inside - index)
    return torch.where(position < 0, torch.inf, found)
