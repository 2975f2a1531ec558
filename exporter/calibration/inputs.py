"""What reaches a layer or a block when a model runs over the calibration set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from exporter.calibration.activations import ActivationStore, BatchLimit
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.input_statistics import InputStatistics, InputSums
from exporter.models.adapter import Adapter
from exporter.models.inputs import HIDDEN_STATES
from exporter.models.prompts import Prompts
from exporter.shards import Shard


@dataclass(frozen=True)
class BlockInputs:
    """Inputs of a block for all M samples.

    `hidden` [M, ...] is the first argument; `shared` holds the tensors [M, ...] that all blocks take, `constants` the
    keyword arguments that are not tensors, and `skips` the outputs [M, ...] of earlier blocks that this one takes.
    `weights` float32 [M] are what the samples' squared errors count, None for all alike.
    """

    hidden: Tensor
    shared: Mapping[str, Tensor]
    constants: Mapping[str, Any]
    skips: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None

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
        """Weighted sum of the squared differences of the block's outputs from `targets` [M, ...]."""
        errors = torch.zeros(len(self), dtype=torch.float64)

        def add(part: slice) -> None:
            difference = self.run(block, part).sub_(targets[part])
            errors[part] = difference.flatten(1).square_().sum(dim=1, dtype=torch.float64)

        limit.each(len(self), self.tokens, add)
        return float((errors if self.weights is None else errors * self.weights).sum())

    def mean_squared_error(self, block: nn.Module, targets: Tensor, indices: Tensor) -> Tensor:
        """Weighted mean of the squared differences of the outputs at `indices` from theirs of `targets` [M, ...]."""
        outputs, wanted = self.run(block, indices), targets[indices]
        if self.weights is None:
            return F.mse_loss(outputs, wanted)
        errors = F.mse_loss(outputs, wanted, reduction="none").flatten(1).mean(dim=1)
        return (errors * self.weights[indices]).mean()

    def square_sum(self, outputs: Tensor) -> float:
        """Weighted sum of the squares of `outputs` [M, ...], sample by sample: there is no memory for another one."""
        weights: list[float] = [1.0] * len(self) if self.weights is None else self.weights.tolist()
        squares = (float(sample.square().sum(dtype=torch.float64)) for sample in outputs)
        return sum(weight * square for weight, square in zip(weights, squares, strict=True))

    def advanced(self, hidden: Tensor) -> BlockInputs:
        """Return the next block's inputs, without skips: `hidden` is the output of this one."""
        return replace(self, hidden=hidden, skips={})

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
class CalibrationRun:
    """The calibration set with its prompts and the family's way of calling a model.

    `store` says where activations of all samples are kept, `limit` how many samples go through a model at once. Of
    several processes each has every `world`-th sample. `weights` float32 [M] are what the squared errors of all
    samples count, None for all alike.
    """

    adapter: Adapter
    calibration_set: CalibrationSet
    prompts: Prompts
    store: ActivationStore = field(default_factory=ActivationStore)
    limit: BatchLimit = field(default_factory=BatchLimit)
    shard: Shard = field(default_factory=Shard)
    weights: Tensor | None = None

    @property
    def samples(self) -> int:
        """How many inputs this process has."""
        return len(self._indices)

    @property
    def own_weights(self) -> Tensor | None:
        """What this process's samples count."""
        return None if self.weights is None else self.weights[self._indices]

    @property
    def _indices(self) -> Tensor:
        return torch.arange(self.shard.rank, len(self.calibration_set), self.shard.world)

    @torch.no_grad()
    def through(self, model: nn.Module, hooks: Iterable[RemovableHandle]) -> None:
        """Run `model` once over this process's samples, in order and some at once, then remove the hooks."""
        size = self.limit.samples(self.samples, self.tokens(model))
        with _removed(hooks):
            for start in range(0, self.samples, size):
                self._forward(model, slice(start, min(start + size, self.samples)))

    def _forward(self, model: nn.Module, part: slice) -> None:
        inputs = self.calibration_set.inputs(self._indices[part], self.prompts)
        self.adapter.forward(model, inputs)

    def tokens(self, model: nn.Module) -> int:
        """Tokens of a sample."""
        channels, height, width = self.calibration_set.hidden_states.shape[1:]
        return self.adapter.tokens(model, (channels, height, width))

    def input_statistics(
        self, model: nn.Module, layers: Iterable[str], largest_gram: int = 0
    ) -> dict[str, InputStatistics]:
        """Return what is known of every layer's input, in order of first execution.

        Gram matrices are made for layers of at most `largest_gram` inputs, of all tokens where they are few, otherwise
        of tokens spread evenly over the set.
        """
        statistics = InputSums(len(self.calibration_set), largest_gram, self.shard, self.weights)
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
            self.limit.each(self.samples, self.tokens(model), step)
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
            self.limit.each(self.samples, self.tokens(model), step)
        hidden = gathered.pop(HIDDEN_STATES).tensor
        shared = {name: parts.tensor for name, parts in gathered.items()}
        return BlockInputs(hidden, shared, constants, weights=self.own_weights)


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
