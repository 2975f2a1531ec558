"""Balance the channels of quantized inputs before anything is quantized, where the model takes it back for free.

A token's scale follows its largest channel, so channels that are always small, or far from zero, lose precision to the
others. Balanced, every channel is centred and divided by the root of its spread: half of the difference in spread
goes into the weights, whose groups have scales of their own (SmoothQuant, arXiv 2211.10438; PTQ4DiT, arXiv 2405.16005).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exporter.calibration.inputs import CalibrationRun
from exporter.models.channel_folds import ChannelFold
from exporter.quantize import share_copy

# Divisors are spread to this power: all of the difference between channels would go into the weights at 1.
_SHARE = 0.5
# Relative to the mean: channels that hardly move are not blown up further.
_SMALLEST_SPREAD = 1e-3


@dataclass(frozen=True)
class Balance:
    """For every fold of a model, in order: divisor float64 [K] and a shift [K] for each of its inputs."""

    divisors: tuple[Tensor, ...]
    shifts: tuple[tuple[Tensor, ...], ...]

    def applied(self, model: nn.Module, folds: Sequence[ChannelFold]) -> nn.Module:
        """A copy of `model` that computes the same with balanced inputs; what has not changed is shared."""
        balanced = share_copy(model)
        for fold, divisor, shifts in zip(folds, self.divisors, self.shifts, strict=True):
            fold.apply(balanced, divisor, shifts)
        return balanced.eval()

    def save(self, path: Path) -> None:
        """Write the numbers as safetensors."""
        tensors = {f"{index}.divisor": divisor for index, divisor in enumerate(self.divisors)}
        for index, shifts in enumerate(self.shifts):
            tensors |= {f"{index}.shift.{number}": shift for number, shift in enumerate(shifts)}
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path, folds: Sequence[ChannelFold]) -> Balance:
        """Read back what was saved for the same folds."""
        tensors = load_file(path)
        return cls(
            tuple(tensors[f"{index}.divisor"] for index in range(len(folds))),
            tuple(
                tuple(tensors[f"{index}.shift.{number}"] for number in range(len(fold.readers)))
                for index, fold in enumerate(folds)
            ),
        )


@dataclass
class Moments:
    """Of the tokens seen so far: their count, their sum and the sum of their squares, per channel."""

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, tokens: Tensor) -> None:
        """Add tokens [..., K]. If memory does not suffice for it, nothing has been added."""
        flat = tokens.flatten(0, -2)
        total = self.total + flat.sum(dim=0, dtype=torch.float64).cpu()
        squares = self.squares + flat.square().sum(dim=0, dtype=torch.float64).cpu()
        self.count, self.total, self.squares = self.count + len(flat), total, squares

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    def spread(self, centre: Tensor) -> Tensor:
        """Root mean square of the distance from `centre`, bounded from below and so that its geometric mean is 1."""
        square = self.squares / self.count - 2 * centre * self.mean + centre.square()
        spread = square.clamp_min(0).sqrt()
        spread = spread.clamp_min(float(spread.mean()) * _SMALLEST_SPREAD or 1.0)
        return spread / spread.log().mean().exp()


def find_balance(
    run: CalibrationRun, model: nn.Module, folds: Sequence[ChannelFold], *, powers_of_two: bool = False
) -> Balance:
    """Look at the inputs that `folds` can change, in the original network over the calibration set.

    Shifts are means where the fold and all readers (their biases) can take them, else 0. With `powers_of_two` divisors
    are the nearest such numbers, all divided by the largest, which the tokens' scales take back: what is divided by
    numbers up to 1 keeps its bits.
    """
    moments = {names[0]: Moments() for fold in folds for names in fold.readers}
    run.through(model, {name: seen.add for name, seen in moments.items()})
    divisors, shifts = [], []
    for fold in folds:
        seen = [moments[names[0]] for names in fold.readers]
        centred = fold.shifts and all(_has_bias(model, name) for names in fold.readers for name in names)
        centres = [one.mean if centred else torch.zeros_like(one.mean) for one in seen]
        spreads = torch.stack([one.spread(centre) for one, centre in zip(seen, centres, strict=True)])
        divisor = spreads.log().mean(dim=0).mul(_SHARE).exp()
        if powers_of_two:
            exponents = divisor.log2().round()
            divisor = (exponents - exponents.max()).exp2()
        divisors.append(divisor)
        shifts.append(tuple(centres))
    return Balance(tuple(divisors), tuple(shifts))


def _has_bias(model: nn.Module, name: str) -> bool:
    return getattr(model.get_submodule(name), "bias", None) is not None
