"""What the inputs of linear layers are like over a calibration set, summed up as they come."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.shards import Shard

# Tokens for a Gram matrix, of the whole set: plenty for a few thousand columns.
_GRAM_TOKENS = 1 << 17


@dataclass(frozen=True)
class InputStatistics:
    """A layer's input X over the calibration set: mean square per channel [K], its largest magnitude, and the Gram
    matrix XᵀX [K, K] where one was made; both count the samples as the run does."""

    mean_square: Tensor
    amax: float
    gram: Tensor | None = None

    def to(self, device: torch.device) -> InputStatistics:
        """The same on a device."""
        gram = None if self.gram is None else self.gram.to(device)
        return InputStatistics(self.mean_square.to(device), self.amax, gram)


class InputSums:
    """Sums over the inputs of layers, from which their statistics come.

    Of `samples` in all, this process's come in order.
    """

    def __init__(self, samples: int, largest_gram: int, shard: Shard, weights: Tensor | None) -> None:
        self._samples, self._largest_gram, self._shard = samples, largest_gram, shard
        self._roots = None if weights is None else weights.sqrt()
        self._squares: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._largest: dict[str, float] = {}
        self._grams: dict[str, Tensor] = {}
        # Layers that share an input, as q, k and v do, run one after the other and share the work.
        self._last: tuple[Tensor, Tensor] | None = None

    def add(self, name: str, x: Tensor) -> None:
        """Take a layer's input [B, ..., K]. What comes of it is kept in main memory."""
        before = self._counts.get(name, 0)
        tokens = self._weighted(before, x.flatten(0, -2), len(x))
        squares = tokens.square().sum(dim=0, dtype=torch.float64).cpu()
        self._squares[name] = self._squares[name] + squares if before else squares
        self._counts[name] = before + len(tokens)
        self._largest[name] = max(self._largest.get(name, 0.0), float(x.abs().amax()))
        if x.shape[-1] > self._largest_gram:
            return
        if self._last is None or self._last[0] is not x:
            chosen = tokens[self._chosen(before, len(x), len(tokens) // len(x)).to(x.device)]
            self._last = x, (chosen.T @ chosen).cpu()
        self._grams[name] = self._grams[name] + self._last[1] if before else self._last[1]

    def _numbers(self, before: int, samples: int, tokens: int) -> Tensor:
        """Which of all samples the next ones are, int64 [samples]: the same whoever has them, and when."""
        own = before // tokens + torch.arange(samples)
        return self._shard.rank + self._shard.world * own

    def _weighted(self, before: int, tokens: Tensor, samples: int) -> Tensor:
        """The next samples' tokens [T, K] times the roots of their samples' weights."""
        if self._roots is None:
            return tokens
        each = len(tokens) // samples
        roots = self._roots[self._numbers(before, samples, each)].repeat_interleave(each)
        return tokens * roots.unsqueeze(1).to(tokens.device)

    def _chosen(self, before: int, samples: int, tokens: int) -> Tensor:
        """Which tokens of the next `samples` count, bool [samples · tokens]."""
        numbers = self._numbers(before, samples, tokens).unsqueeze(1) * tokens + torch.arange(tokens)
        return numbers.flatten() % _spread(self._samples * tokens) == 0

    def result(self) -> dict[str, InputStatistics]:
        """The statistics of every layer that has run, of all processes."""
        return {name: self._statistics(name) for name in self._squares}

    def _statistics(self, name: str) -> InputStatistics:
        squares, gram = self._shard.add_up(self._squares[name]), self._grams.get(name)
        count = self._shard.add_up(torch.tensor(self._counts[name]))
        return InputStatistics(
            (squares / count).float(),
            self._shard.largest(self._largest[name]),
            # Layers with the same input have the same tensor.
            None if gram is None else self._shard.add_up(gram if self._shard.world == 1 else gram.clone()),
        )


def _spread(tokens: int) -> int:
    """Every how many of so many tokens `_GRAM_TOKENS` are taken; odd, so that it is not always a sample's same ones."""
    return math.ceil(tokens / _GRAM_TOKENS) | 1
