"""Scale-aware AdaRound on a floating-point grid (FP4DiT, arXiv 2503.15465, eq. 8; AdaRound, arXiv 2004.10568).

A weight lies between two neighbours of its format's grid; a learned h in [0, 1] says where between them it goes, and
a growing penalty drives h to 0 or 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from exporter.method_section import MethodSection
from exporter.quantize import expand_scales
from exporter.rounding import element_step
from plugins.formats import Format

# The stretched sigmoid h = clip(σ(v)·(ζ − γ) + γ, 0, 1) of AdaRound, eq. 23.
ZETA = 1.1
GAMMA = -0.1

# How far h begins from the unrounded weight towards values that it is to start with. Past the middle, so that the first
# decisions are these wherever in its cell the weight lies. Nearer to them it starts as well as they are (measured
# once, on the digits model: 0.9 ended 2 dB better than 0.6); at 1 the gradient of h would vanish.
_START_SHARE = 0.9

# The next float32 below is this times as large.
_JUST_BELOW = 1 - 2.0**-24

# Keeps the logarithm of |2h − 1| finite.
_SMALLEST_BASE = 1e-30


@dataclass(frozen=True)
class Penalty:
    """The term weight · Σ(1 − |2h − 1|^beta) of the objective, which draws h away from 1/2."""

    weight: float
    beta: float


@dataclass(frozen=True)
class Schedule:
    """How the penalty grows: none during the first `warmup` share of `iterations`, then beta falls linearly."""

    iterations: int
    warmup: float
    weight: float
    beta_start: float
    beta_end: float

    @classmethod
    def of(cls, method: MethodSection) -> Schedule:
        """The one that a recipe's method sets."""
        return cls(method.iterations, method.warmup, method.regularization, method.beta_start, method.beta_end)

    def penalty(self, iteration: int) -> Penalty | None:
        """Return the penalty in force at `iteration`, counted from 0; None during the warm-up."""
        begin = self.warmup * self.iterations
        if iteration < begin:
            return None
        progress = (iteration - begin) / max(self.iterations - begin, 1.0)
        return Penalty(self.weight, self.beta_start + (self.beta_end - self.beta_start) * progress)


class LearnedRounding(nn.Module):
    """The roundings of one weight [N, K] on given scales [N, G].

    Everything but `alpha` is computed once and frozen: the neighbour nearer to zero, the signed distance to the one
    further away, and the element's step relative to the group's largest value. The logit is alpha / relative step:
    the published parametrisation with the group's absmax as the unit of alpha, so that neither a weight's unit nor
    its group's scale changes what a learning rate means.
    """

    lower: Tensor
    gap: Tensor
    inverse_step: Tensor

    def __init__(self, weight: Tensor, scales: Tensor, fmt: Format, start: Tensor | None = None) -> None:
        """`start` [N, K] are values of the format, in units of the scales, that the decisions begin with; without them
        they begin with the nearest ones."""
        super().__init__()
        self._format = fmt
        self._scales = expand_scales(scales, weight.shape[1])
        units = weight / self._scales
        if start is not None:
            units = _in_a_cell_beside(start, units, fmt)
        # One float32 below the largest value, which has no neighbour above: so it is the upper one of its pair.
        magnitude = units.abs().clamp_(max=fmt.max * _JUST_BELOW)
        step = element_step(magnitude, fmt)
        floor = (magnitude / step).floor_()
        fraction = magnitude / step - floor
        if start is not None:
            chosen = (start.abs() > floor * step).to(fraction)
            fraction = torch.lerp(fraction, chosen, _START_SHARE)
        self._lower_units = torch.copysign(floor * step, units)
        self._gap_units = torch.copysign(step, units)
        self.register_buffer("lower", self._lower_units * self._scales, persistent=False)
        self.register_buffer("gap", self._gap_units * self._scales, persistent=False)
        self.register_buffer("inverse_step", fmt.max / step, persistent=False)
        self.alpha = nn.Parameter(torch.logit((fraction - GAMMA) / (ZETA - GAMMA)) / self.inverse_step)

    def soft_weight(self, penalty: Penalty | None) -> Tensor:
        """Return lower + h·gap [N, K]; its backward pass adds the penalty's gradient to alpha's."""
        weight: Tensor = _SoftWeight.apply(  # type: ignore[no-untyped-call]
            self.alpha, self.inverse_step, self.lower, self.gap, penalty
        )
        return weight

    def hard_values(self) -> Tensor:
        """Return the decided values [N, K] in units of the scale: always values of the format, zeros positive."""
        up = self.alpha.detach() >= 0
        return torch.where(up, self._lower_units + self._gap_units, self._lower_units).add_(0.0)

    def penalty(self, penalty: Penalty) -> Tensor:
        """Return the penalty's value, a scalar."""
        h = _stretched_sigmoid(torch.sigmoid(self.alpha * self.inverse_step)).clamp(0.0, 1.0)
        return penalty.weight * (1 - (2 * h - 1).abs().pow(penalty.beta)).sum()


def _in_a_cell_beside(values: Tensor, units: Tensor, fmt: Format) -> Tensor:
    """Move `units` as little as puts them between the neighbours of `values`, both [N, K]."""
    sign = torch.where(values == 0, units, values).sign()
    magnitude = values.abs()
    below = magnitude - element_step(magnitude * _JUST_BELOW, fmt)
    above = (magnitude + element_step(magnitude, fmt)) * _JUST_BELOW
    return (units * sign).clamp_(min=below, max=above) * sign


def _stretched_sigmoid(sigmoid: Tensor) -> Tensor:
    """Return σ·(ζ − γ) + γ, not clipped yet."""
    return (sigmoid * (ZETA - GAMMA)).add_(GAMMA)


class _SoftWeight(torch.autograd.Function):
    """lower + h(alpha)·gap with the penalty's gradient, in few passes over memory: an iteration's fixed cost."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, alpha: Tensor, inverse_step: Tensor, lower: Tensor, gap: Tensor, penalty: Penalty | None
    ) -> Tensor:
        sigmoid = (alpha * inverse_step).sigmoid_()
        h = _stretched_sigmoid(sigmoid)
        ctx.save_for_backward(sigmoid, h, inverse_step, gap)
        ctx.penalty = penalty  # type: ignore[attr-defined]
        return torch.addcmul(lower, h.clamp(0.0, 1.0), gap)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        sigmoid, h, inverse_step, gap = ctx.saved_tensors  # type: ignore[attr-defined]
        penalty: Penalty | None = ctx.penalty  # type: ignore[attr-defined]
        gradient = gradients[0] * gap
        if penalty is not None:
            # d/dh of weight·(1 − |2h − 1|^beta). The power as exp(log): several times faster than pow.
            centred = (2 * h).sub_(1.0)
            slope = centred.abs().clamp_(min=_SMALLEST_BASE).log_().mul_(penalty.beta - 1).exp_().copysign_(centred)
            gradient.add_(slope, alpha=-2 * penalty.weight * penalty.beta)
        # dh/dalpha = (ζ − γ)·σ·(1 − σ)·inverse_step, and 0 where h is clipped.
        gradient = torch.ops.aten.hardtanh_backward(gradient, h, 0.0, 1.0)
        gradient = torch.ops.aten.sigmoid_backward(gradient, sigmoid)
        return gradient.mul_(inverse_step).mul_(ZETA - GAMMA), None, None, None, None
