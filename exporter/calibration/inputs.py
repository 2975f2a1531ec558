"""What reaches a layer or a block when a model runs over the calibration set."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from exporter.calibration.activations import ActivationStore, BatchLimit
from exporter.calibration.capture import CalibrationSet
from exporter.models.adapter import Adapter
from exporter.models.inputs import HIDDEN_STATES
from exporter.models.prompts import Prompts
from exporter.shards import Shard

# Tokens for a Gram matrix, of the whole set: plenty for a few thousand columns.
_GRAM_TOKENS = 1 << 17


@dataclass(frozen=True)
class BlockInputs:
    """Inputs of a block for all M samples.

    `hidden` [M, ...] is the first argument; `shared` holds the tensors [M, ...] that all blocks take, `constants` the
    keyword arguments that are not tensors, and `skips` the outputs [M, ...] of earlier blocks that this one takes.
    """

    hidden: Tensor
    shared: Mapping[str, Tensor]
    constants: Mapping[str, Any]
    skips: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def tokens(self) -> int:
        """Tokens of a sample."""
        return self.hidden[0].numel() // self.hidden.shape[-1]

    def run(self, block: nn.Module, indices: Tensor | slice) -> Tensor:
        """Run `block` on the samples at `indices`."""
        tensors = {name: tensor[indices] for name, tensor in {**self.shared, **self.skips}.items()}
        output: Tensor = block(self.hidden[indices], **tensors, **self.constants)
        return output

    @torch.no_grad()
    def outputs(self, block: nn.Module, store: ActivationStore, limit: BatchLimit) -> Tensor:
        """Run `block` on all samples: [M, ...]."""
        gathered = _Gathered(len(self), store)
        limit.each(len(self), self.tokens, lambda part: gathered.put(part, self.run(block, part)))
        return gathered.tensor

    @torch.no_grad()
    def squared_error(self, block: nn.Module, targets: Tensor, limit: BatchLimit) -> float:
        """Sum of the squared differences of the block's outputs from `targets` [M, ...]."""
        errors = torch.zeros(len(self), dtype=torch.float64)

        def add(part: slice) -> None:
            difference = self.run(block, part).sub_(targets[part])
            errors[part] = difference.flatten(1).square_().sum(dim=1, dtype=torch.float64)

        limit.each(len(self), self.tokens, add)
        return float(errors.sum())

    def advanced(self, hidden: Tensor) -> BlockInputs:
        """Return the next block's inputs, without skips: `hidden` is the output of this one."""
        return BlockInputs(hidden, self.shared, self.constants)

    def with_skips(self, skips: Mapping[str, Tensor]) -> BlockInputs:
        """Return the same inputs with outputs of earlier blocks, by keyword argument."""
        return replace(self, skips=skips)


class _Gathered:
    """A tensor [M, ...] that comes in parts."""

    def __init__(self, samples: int, store: ActivationStore) -> None:
        self._samples, self._store = samples, store
        self._tensor: Tensor | None = None

    def put(self, part: slice, values: Tensor) -> None:
        """Take the samples of one part."""
        if self._tensor is None:
            self._tensor = self._store.empty((self._samples, *values.shape[1:]), values.dtype)
        self._tensor[part] = values

    @property
    def tensor(self) -> Tensor:
        """All of them, once every part was put."""
        if self._tensor is None:
            raise ValueError("there are no samples")
        return self._tensor


@dataclass(frozen=True)
class InputStatistics:
    """A layer's input X over the calibration set: mean square per channel [K], its largest magnitude, and the Gram
    matrix XᵀX [K, K] where one was made."""

    mean_square: Tensor
    amax: float
    gram: Tensor | None = None


@dataclass(frozen=True)
class CalibrationRun:
    """The calibration set with its prompts and the family's way of calling a model.

    `store` says where activations of all samples are kept, `limit` how many samples go through a model at once. Of
    several processes each has every `world`-th sample.
    """

    adapter: Adapter
    calibration_set: CalibrationSet
    prompts: Prompts
    store: ActivationStore = field(default_factory=ActivationStore)
    limit: BatchLimit = field(default_factory=BatchLimit)
    shard: Shard = field(default_factory=Shard)

    @property
    def samples(self) -> int:
        """How many inputs this process has."""
        return len(self._indices)

    @property
    def _indices(self) -> Tensor:
        return torch.arange(self.shard.rank, len(self.calibration_set), self.shard.world)

    @torch.no_grad()
    def through(self, model: nn.Module, hooks: Iterable[RemovableHandle]) -> None:
        """Run `model` once over this process's samples, in order and some at once, then remove the hooks."""
        size = self.limit.samples(self.samples, self._tokens(model))
        with _removed(hooks):
            for start in range(0, self.samples, size):
                self._forward(model, slice(start, min(start + size, self.samples)))

    def _forward(self, model: nn.Module, part: slice) -> None:
        inputs = self.calibration_set.inputs(self._indices[part], self.prompts)
        self.adapter.forward(model, inputs)

    def _tokens(self, model: nn.Module) -> int:
        channels, height, width = self.calibration_set.hidden_states.shape[1:]
        return self.adapter.tokens(model, (channels, height, width))

    def input_statistics(
        self, model: nn.Module, layers: Iterable[str], largest_gram: int = 0
    ) -> dict[str, InputStatistics]:
        """Return what is known of every layer's input, in order of first execution.

        Gram matrices are made for layers of at most `largest_gram` inputs, of all tokens where they are few, otherwise
        of tokens spread evenly over the set.
        """
        statistics = _Sums(len(self.calibration_set), largest_gram, self.shard)
        self.through(model, [_watch(model, name, statistics.add) for name in layers])
        return statistics.result()

    @torch.no_grad()
    def layer_inputs(self, model: nn.Module, layer: str) -> Tensor:
        """Return the inputs [M, ..., K] of one linear layer."""
        seen: list[Tensor] = []
        gathered = _Gathered(self.samples, self.store)

        def step(part: slice) -> None:
            seen.clear()
            self._forward(model, part)
            gathered.put(part, seen[0])

        with _removed([_watch(model, layer, lambda _, x: seen.append(x))]):
            self.limit.each(self.samples, self._tokens(model), step)
        return gathered.tensor

    @torch.no_grad()
    def block_inputs(self, model: nn.Module, block: nn.Module) -> BlockInputs:
        """Return the inputs of `block`, the first of `model`; nothing behind it runs."""
        seen: dict[str, Tensor] = {}
        constants: dict[str, Any] = {}
        gathered: dict[str, _Gathered] = {}

        def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            seen[HIDDEN_STATES] = args[0]
            for name, value in kwargs.items():
                (seen if isinstance(value, Tensor) else constants)[name] = value
            raise _ReachedError

        def step(part: slice) -> None:
            with contextlib.suppress(_ReachedError):
                self._forward(model, part)
            for name, value in seen.items():
                gathered.setdefault(name, _Gathered(self.samples, self.store)).put(part, value)

        with _removed([block.register_forward_pre_hook(keep, with_kwargs=True)]):
            self.limit.each(self.samples, self._tokens(model), step)
        hidden = gathered.pop(HIDDEN_STATES).tensor
        return BlockInputs(hidden, {name: parts.tensor for name, parts in gathered.items()}, constants)


class _Sums:
    """Sums over the inputs of layers, from which their statistics come.

    Of `samples` in all, this process's come in order.
    """

    def __init__(self, samples: int, largest_gram: int, shard: Shard) -> None:
        self._samples, self._largest_gram, self._shard = samples, largest_gram, shard
        self._squares: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._largest: dict[str, float] = {}
        self._grams: dict[str, Tensor] = {}
        # Layers that share an input, as q, k and v do, run one after the other and share the work.
        self._last: tuple[Tensor, Tensor] | None = None

    def add(self, name: str, x: Tensor) -> None:
        """Take a layer's input [B, ..., K]."""
        tokens = x.flatten(0, -2)
        squares = tokens.square().sum(dim=0, dtype=torch.float64)
        before = self._counts.get(name, 0)
        self._squares[name] = self._squares[name] + squares if before else squares
        self._counts[name] = before + len(tokens)
        self._largest[name] = max(self._largest.get(name, 0.0), float(x.abs().amax()))
        if x.shape[-1] > self._largest_gram:
            return
        if self._last is None or self._last[0] is not x:
            chosen = tokens[self._chosen(before, len(x), len(tokens) // len(x))]
            self._last = x, chosen.T @ chosen
        self._grams[name] = self._grams[name] + self._last[1] if before else self._last[1]

    def _chosen(self, before: int, samples: int, tokens: int) -> Tensor:
        """Which tokens of the next `samples` count, bool [samples · tokens]: the same whoever has them, and when."""
        own = before // tokens + torch.arange(samples)
        numbers = (self._shard.rank + self._shard.world * own).unsqueeze(1) * tokens + torch.arange(tokens)
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


class _ReachedError(Exception):
    """The forward pass has come to the block whose inputs are wanted; the rest of it would be thrown away."""


def _watch(model: nn.Module, layer: str, see: Callable[[str, Tensor], None]) -> RemovableHandle:
    """Call `see(layer, input)` whenever the layer runs."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(layer, args[0])

    return model.get_submodule(layer).register_forward_pre_hook(hook)


@contextmanager
def _removed(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    handles = list(hooks)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
