"""Choose among scales by what they cost the layer's output, with the rounding that they lead to.

The error of an output channel is e·H·eᵀ: e [K] is what rounding does to its weights, H [K, K] the Gram matrix of the
layer's inputs. Its diagonal alone, which the first search goes by, does not see that errors of weights whose inputs
move together cancel or add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from exporter.calibration.input_statistics import InputStatistics
from exporter.calibration.scales import (
    SMALLEST_SCALE,
    ScaleSearch,
    channel_bits,
    choose_scales,
    round_significand,
    rows_at_once,
)
from exporter.rounding import power_of_two_below, round_to_format
from plugins.formats import Format

WeightSearch = Literal["absmax", "mse", "output"]

LARGEST_GRAM = 6144
"""Rows longer than this keep the first search's scales: a Gram matrix of 150 MB a layer is the most that is held."""

_ROW_FACTORS = tuple(2.0 ** (step / 16) for step in range(-8, 9) if step)
_FINE_FACTORS = (0.97, 0.98, 0.99, 0.995, 1.005, 1.01, 1.02, 1.03)
_GROUP_FACTORS = tuple(2.0 ** (step / 24) for step in range(-9, 10) if step)
_NEIGHBOURS = (-2, -1, 1, 2)
_PASSES = 2
# Rows of a weight at once on a CPU, so that what is rounded stays in the cache.
_ROWS = 256


def search_scales(
    weight: Tensor,
    fmt: Format,
    group_size: int,
    search: WeightSearch,
    statistics: InputStatistics | None,
    multipliers: Sequence[int] = (),
) -> Tensor:
    """Return scales [N, G] as a recipe's `method.scale_search` has them.

    "absmax" and "mse" are `choose_scales`'s, the latter weighted by the inputs' mean squares; "output" refines what
    "mse" finds where there is a Gram matrix.
    """
    importance = None if statistics is None else statistics.mean_square
    first: ScaleSearch = "absmax" if search == "absmax" else "mse"
    scales = choose_scales(weight, fmt, group_size, first, importance, multipliers)
    if search != "output" or statistics is None or statistics.gram is None:
        return scales
    return refine_scales(weight, scales, fmt, statistics.gram, multipliers)


def refine_scales(weight: Tensor, scales: Tensor, fmt: Format, gram: Tensor, multipliers: Sequence[int] = ()) -> Tensor:
    """Return scales [N, G] of the kind that `scales` are, with no more output error when `weight` [N, K] is rounded
    to nearest on them.

    `gram` [K, K] is the inputs' Gram matrix in any unit. With `multipliers` the scales are foldable and stay so: the
    row's scale and all its multipliers are varied together, then one multiplier after the other; without, one scale
    after the other. Everything that `choose_scales` promises of its scales holds.
    """
    gram = gram / gram.diagonal().mean().clamp_min(SMALLEST_SCALE)
    unit = power_of_two_below(weight.abs().amax(dim=1, keepdim=True)).clamp_(min=SMALLEST_SCALE)
    rows = _ROWS if weight.device.type == "cpu" else rows_at_once(weight)
    parts = zip(torch.split(weight / unit, rows), torch.split(scales / unit, rows), strict=True)
    refined = [_refine_rows(_OutputError(part, fmt, gram), start, tuple(multipliers)) for part, start in parts]
    return torch.cat(refined) * unit


@dataclass(frozen=True)
class _OutputError:
    """The output error of rounding rows [n, K] to nearest on given scales."""

    weight: Tensor
    fmt: Format
    gram: Tensor

    def rounding(self, scales: Tensor, columns: slice = slice(None)) -> Tensor:
        """What rounding adds to the weights in `columns`: scales [n, G] → [n, K']."""
        weight = self.weight[:, columns]
        repeated = scales.repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)
        return round_to_format(weight / repeated, self.fmt).mul_(repeated).sub_(weight)

    def __call__(self, scales: Tensor) -> Tensor:
        """scales [n, G] → the rows' errors [n, 1]."""
        rounding = self.rounding(scales)
        return (rounding @ self.gram).mul_(rounding).sum(dim=1, keepdim=True)


def _refine_rows(error: _OutputError, scales: Tensor, allowed: tuple[int, ...]) -> Tensor:
    if not allowed:
        factors = torch.tensor(_GROUP_FACTORS, device=scales.device).unsqueeze(1)
        return _refine_groups(error, scales, lambda scale: round_significand(scale * factors))
    steps = torch.tensor(allowed, dtype=torch.float32, device=scales.device)
    channel, chosen = _split(scales, steps)
    channel, chosen = _refine_channel(error, channel, chosen, steps, channel_bits(allowed))
    offsets = torch.tensor(_NEIGHBOURS, device=scales.device).unsqueeze(1)

    def neighbours(scale: Tensor) -> Tensor:
        nearest = _nearest(scale / channel[:, 0], steps)
        return channel[:, 0] * steps[(nearest + offsets).clamp(0, len(steps) - 1)]

    return _refine_groups(error, channel * chosen, neighbours)


def _split(scales: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Channel scales [n, 1] and multipliers [n, G] out of `steps` whose products are exactly the foldable `scales`."""
    smallest = scales.amin(dim=1, keepdim=True)
    channel, chosen = smallest / steps[0], torch.zeros_like(scales)
    for step in reversed(steps):
        base = smallest / step
        ratio = (scales / base).round()
        exact = ((base * ratio == scales) & torch.isin(ratio, steps)).all(dim=1, keepdim=True)
        channel, chosen = torch.where(exact, base, channel), torch.where(exact, ratio, chosen)
    if not bool(chosen.all()):
        raise ValueError("the scales are not foldable by the multipliers")
    return channel, chosen


def _refine_channel(
    error: _OutputError, channel: Tensor, chosen: Tensor, steps: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Vary the row's scale: first with the multipliers that keep the groups' scales about the same, then finely."""
    least, start, begin = error(channel * chosen), channel, chosen
    for factor in _ROW_FACTORS:
        candidate, multiples = round_significand(start * factor, bits), steps[_nearest(begin / factor, steps)]
        found = error(candidate * multiples)
        better = found < least
        channel, chosen = torch.where(better, candidate, channel), torch.where(better, multiples, chosen)
        least = torch.minimum(found, least)
    start = channel
    for factor in _FINE_FACTORS:
        candidate = round_significand(start * factor, bits)
        found = error(candidate * chosen)
        channel, least = torch.where(found < least, candidate, channel), torch.minimum(found, least)
    return channel, chosen


def _refine_groups(error: _OutputError, scales: Tensor, propose: Callable[[Tensor], Tensor]) -> Tensor:
    """Give one group after the other the best of the scales [c, n] that `propose(its scales [n])` names.

    Changing a group's rounding by d changes the error by d·(2·H·e + H_gg·d), so that no candidate costs a full product.
    """
    scales, rounding = scales.clone(), error.rounding(scales)
    size = rounding.shape[1] // scales.shape[1]
    for _ in range(_PASSES):
        for group in range(scales.shape[1]):
            columns = slice(group * size, (group + 1) * size)
            pull = 2 * (rounding @ error.gram[:, columns])
            best, change, least = scales[:, group], torch.zeros_like(pull), torch.zeros_like(scales[:, 0])
            for candidate in propose(scales[:, group]):
                moved = error.rounding(candidate.unsqueeze(1), columns) - rounding[:, columns]
                gain = (moved @ error.gram[columns, columns]).add_(pull).mul_(moved).sum(dim=1)
                better = gain < least
                best, least = torch.where(better, candidate, best), torch.where(better, gain, least)
                change = torch.where(better.unsqueeze(1), moved, change)
            scales[:, group] = best
            rounding[:, columns] += change
    return scales


def _nearest(values: Tensor, steps: Tensor) -> Tensor:
    """Indices of the entries of `steps` [s] that `values` [...] are nearest to."""
    return (values.unsqueeze(-1) - steps).abs_().argmin(dim=-1)
