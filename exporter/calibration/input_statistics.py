"""What the inputs of linear layers are like over a calibration set, summed up as they come."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exporter.shards import Shard

# Tokens for a Gram matrix, of the whole set: plenty for a few thousand columns.
_GRAM_TOKENS = 1 << 17


@dataclass(frozen=True)
class InputStatistics:
    """A layer's input X over the calibration set: mean square per channel [K], its largest magnitude, its least number,
    and the Gram matrix XᵀX [K, K] where one was made; squares and products count the samples as the run does."""

    mean_square: Tensor
    amax: float
    least: float
    gram: Tensor | None = None

    def to(self, device: torch.device) -> InputStatistics:
        """The same on a device."""
        gram = None if self.gram is None else self.gram.to(device)
        return InputStatistics(self.mean_square.to(device), self.amax, self.least, gram)


@dataclass(frozen=True)
class _Sums:
    """Of the tokens seen so far: their number, the sums of their squares [K], their least and largest number, and XᵀX
    [K, K] of those that count for it, if any do."""

    count: int
    squares: Tensor
    least: float
    largest: float
    gram: Tensor | None

    def plus(self, other: _Sums) -> _Sums:
        """Of both."""
        gram = None if self.gram is None or other.gram is None else self.gram + other.gram.to(self.gram.device)
        squares = self.squares + other.squares
        least, largest = min(self.least, other.least), max(self.largest, other.largest)
        return _Sums(self.count + other.count, squares, least, largest, gram)


class InputSums:
    """Sums over the inputs of layers, from which their statistics come.

    Of `samples` in all, this process's come in order. Gram matrices stay on a GPU where they are made as long as its
    `room`, in bytes, suffices.
    """

    def __init__(
        self, samples: int, largest_gram: int, shard: Shard, weights: Tensor | None = None, room: int = 0
    ) -> None:
        self._samples, self._largest_gram, self._shard = samples, largest_gram, shard
        self._room = room
        self._roots = None if weights is None else weights.sqrt()
        self._sums: dict[str, _Sums] = {}
        # By layer, in order of first execution, the one whose sums are its own, too: layers that share an input, as q,
        # k and v do, run one after the other, and the first of them sees it for all.
        self._first: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None

    def add(self, name: str, x: Tensor) -> None:
        """Take a layer's input [B, ..., K]. If memory does not suffice for it, nothing has been added."""
        if name not in self._first and self._last is not None and self._last[1] is x:
            self._first[name] = self._last[0]
        if self._first.get(name, name) != name:
            return
        before = self._sums.get(name)
        sums = self._sums_of(x, 0 if before is None else before.count)
        self._sums[name] = self._placed(sums) if before is None else before.plus(sums)
        self._first[name] = name
        self._last = name, x

    def _placed(self, sums: _Sums) -> _Sums:
        """A layer's first sums where all of its sums will be."""
        if sums.gram is None:
            return sums
        if sums.gram.nbytes > self._room:
            return replace(sums, gram=sums.gram.cpu())
        self._room -= sums.gram.nbytes
        return sums

    def _sums_of(self, x: Tensor, before: int) -> _Sums:
        """Of the next samples [B, ..., K], behind so many tokens."""
        tokens = self._weighted(before, x.flatten(0, -2), len(x))
        squares = tokens.square().sum(dim=0, dtype=torch.float64).cpu()
        gram = None
        if x.shape[-1] <= self._largest_gram:
            chosen = tokens[self._chosen(before, len(x), len(tokens) // len(x)).to(x.device)]
            gram = chosen.T @ chosen
        least, largest = x.aminmax()
        return _Sums(len(tokens), squares, float(least), float(largest), gram)

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
        """The statistics of every layer that has run, of all processes; layers with the same input have the same."""
        made = {name: self._statistics(sums) for name, sums in self._sums.items()}
        return {name: made[first] for name, first in self._first.items()}

    def _statistics(self, sums: _Sums) -> InputStatistics:
        squares, count = self._shard.add_up(sums.squares), self._shard.add_up(torch.tensor(sums.count))
        # Processes may have kept it in different places.
        gram = None if sums.gram is None else self._shard.add_up(sums.gram.cpu())
        below, above = self._shard.largest(-sums.least), self._shard.largest(sums.largest)
        return InputStatistics((squares / count).float(), max(above, below), -below, gram)


def _spread(tokens: int) -> int:
    """Every how many of so many tokens `_GRAM_TOKENS` are taken; odd, so that it is not always a sample's same ones."""
    return math.ceil(tokens / _GRAM_TOKENS) | 1
