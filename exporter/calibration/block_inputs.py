"""A block's inputs for all samples, and what the block makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.calibration.activations import ActivationStore, BatchLimit
from exporter.calibration.placement import CPU
from exporter.calibration.transfers import Gathered, on_device


@dataclass(frozen=True)
class BlockInputs:
    """Inputs of a block for all M samples.

    `hidden` [M, ...] is the first argument; `shared` holds the tensors [M, ...] that all blocks take, `constants` the
    keyword arguments that are not tensors, and `skips` the outputs [M, ...] of earlier blocks that this one takes.
    Those of all samples are where the run keeps activations; the block computes on `device`. `weights` float32 [M] are
    what the samples' squared errors count, None for all alike.
    """

    hidden: Tensor
    shared: Mapping[str, Tensor]
    constants: Mapping[str, Any]
    skips: Mapping[str, Tensor] = field(default_factory=dict)
    device: torch.device = CPU
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def tokens(self) -> int:
        """Tokens of a sample."""
        return self.hidden[0].numel() // self.hidden.shape[-1]

    def run(self, block: nn.Module, indices: Tensor | slice) -> Tensor:
        """Run `block`, which is on the device, on the samples at `indices`."""
        given = {**self.shared, **self.skips}
        tensors = {name: self._at(indices, tensor) for name, tensor in given.items()}
        output: Tensor = block(self._at(indices, self.hidden), **tensors, **self.constants)
        return output

    @torch.no_grad()
    def outputs(self, block: nn.Module, store: ActivationStore, limit: BatchLimit) -> Tensor:
        """Run `block` on all samples: [M, ...]."""
        gathered = Gathered(len(self), store)
        limit.each(len(self), self.tokens, lambda part: gathered.put(part, self.run(block, part)))
        return gathered.tensor

    @torch.no_grad()
    def squared_error(self, block: nn.Module, targets: Tensor, limit: BatchLimit) -> float:
        """Weighted sum of the squared differences of the block's outputs from `targets` [M, ...]."""
        errors = torch.zeros(len(self), dtype=torch.float64)

        def add(part: slice) -> None:
            difference = self.run(block, part).sub_(self._at(part, targets))
            errors[part] = difference.flatten(1).square_().sum(dim=1, dtype=torch.float64)

        limit.each(len(self), self.tokens, add)
        return self._weighted_sum(errors)

    @torch.no_grad()
    def channel_errors(self, block: nn.Module, targets: Tensor, indices: Tensor, limit: BatchLimit) -> Tensor:
        """Sums float64 [2, C] over the samples at `indices`, by output channel: the squared differences of the block's
        outputs from `targets` [M, ..., C], and the squares of the targets."""
        sums = torch.zeros(2, targets.shape[-1], dtype=torch.float64)

        def add(part: slice) -> None:
            wanted = self._at(indices[part], targets)
            difference = self.run(block, indices[part]) - wanted
            both = torch.stack([difference, wanted]).flatten(1, -2)
            sums.add_(both.square_().sum(dim=1, dtype=torch.float64).cpu())

        limit.each(len(indices), self.tokens, add)
        return sums

    def mean_squared_error(
        self, block: nn.Module, targets: Tensor, indices: Tensor, channels: Tensor | None = None
    ) -> Tensor:
        """Weighted mean of the squared differences of the outputs at `indices` from theirs of `targets` [M, ..., C].

        `channels` [C] are 1 for those that count and 0 for the others, None if all do.
        """
        outputs, wanted = self.run(block, indices), self._at(indices, targets)
        if channels is not None:
            counted = channels.to(self.device)
            outputs, wanted = outputs * counted, wanted * counted
        if self.weights is None:
            return F.mse_loss(outputs, wanted)
        errors = F.mse_loss(outputs, wanted, reduction="none").flatten(1).mean(dim=1)
        return (errors * self.weights[indices].to(self.device)).mean()

    def square_sum(self, outputs: Tensor, limit: BatchLimit) -> float:
        """Weighted sum of the squares of `outputs` [M, ...]."""
        squares = torch.zeros(len(self), dtype=torch.float64)

        def add(part: slice) -> None:
            squares[part] = self._at(part, outputs).flatten(1).square().sum(dim=1, dtype=torch.float64)

        limit.each(len(self), self.tokens, add)
        return self._weighted_sum(squares)

    def _at(self, indices: Tensor | slice, activations: Tensor) -> Tensor:
        return on_device(activations, indices, self.device)

    def _weighted_sum(self, values: Tensor) -> float:
        return float((values if self.weights is None else values * self.weights).sum())

    def roots(self, part: slice, axes: int) -> Tensor:
        """The roots of what the samples of `part` count, [B, 1, ...] with so many axes, on the device."""
        counted = torch.ones(len(self))[part] if self.weights is None else self.weights[part]
        return counted.sqrt().view(-1, *[1] * (axes - 1)).to(self.device)

    def advanced(self, hidden: Tensor) -> BlockInputs:
        """Return the next block's inputs, without skips: `hidden` is the output of this one."""
        return replace(self, hidden=hidden, skips={})

    def with_skips(self, skips: Mapping[str, Tensor]) -> BlockInputs:
        """Return the same inputs with outputs of earlier blocks, by keyword argument."""
        return replace(self, skips=skips)
