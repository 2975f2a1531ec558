"""What reaches a layer or a block when a model runs over the calibration set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from exporter.calibration.capture import CalibrationSet
from exporter.models.adapter import Adapter
from exporter.models.inputs import TransformerInputs
from exporter.models.prompts import Prompts

BATCH = 32
# Of a batch, for Gram matrices: enough to fill one of a few thousand columns over some batches.
_GRAM_TOKENS = 2048


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

    def run(self, block: nn.Module, indices: Tensor | slice) -> Tensor:
        """Run `block` on the samples at `indices`."""
        tensors = {name: tensor[indices] for name, tensor in {**self.shared, **self.skips}.items()}
        output: Tensor = block(self.hidden[indices], **tensors, **self.constants)
        return output

    @torch.no_grad()
    def outputs(self, block: nn.Module) -> Tensor:
        """Run `block` on all samples: [M, ...]."""
        starts = range(0, len(self), BATCH)
        return torch.cat([self.run(block, slice(start, start + BATCH)) for start in starts])

    def advanced(self, hidden: Tensor) -> BlockInputs:
        """Return the next block's inputs, without skips: `hidden` is the output of this one."""
        return BlockInputs(hidden, self.shared, self.constants)

    def with_skips(self, skips: Mapping[str, Tensor]) -> BlockInputs:
        """Return the same inputs with outputs of earlier blocks, by keyword argument."""
        return replace(self, skips=skips)


@dataclass(frozen=True)
class InputStatistics:
    """A layer's input X over the calibration set: mean square per channel [K], its largest magnitude, and the Gram
    matrix XᵀX [K, K] where one was made."""

    mean_square: Tensor
    amax: float
    gram: Tensor | None = None


@dataclass(frozen=True)
class CalibrationRun:
    """The calibration set with its prompts and the family's way of calling a model."""

    adapter: Adapter
    calibration_set: CalibrationSet
    prompts: Prompts

    def batches(self) -> Iterator[TransformerInputs]:
        """Yield all inputs in order, a batch at a time."""
        count = len(self.calibration_set)
        for start in range(0, count, BATCH):
            yield self.calibration_set.inputs(torch.arange(start, min(start + BATCH, count)), self.prompts)

    @torch.no_grad()
    def through(self, model: nn.Module, hooks: Iterable[RemovableHandle]) -> None:
        """Run `model` over the whole set, then remove the hooks."""
        with _removed(hooks):
            for inputs in self.batches():
                self.adapter.forward(model, inputs)

    def input_statistics(
        self, model: nn.Module, layers: Iterable[str], largest_gram: int = 0
    ) -> dict[str, InputStatistics]:
        """Return what is known of every layer's input, in order of first execution.

        Gram matrices are made for layers of at most `largest_gram` inputs, of the whole set where its batches are
        small, otherwise of tokens spread evenly over each.
        """
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        largest: dict[str, float] = {}
        grams: dict[str, Tensor] = {}
        # Layers that share an input, as q, k and v do, run one after the other and share the work.
        shared: tuple[Tensor, Tensor] | None = None

        def add(name: str, x: Tensor) -> None:
            nonlocal shared
            squares = x.flatten(0, -2).square().sum(dim=0, dtype=torch.float64)
            sums[name] = sums[name] + squares if name in sums else squares
            counts[name] = counts.get(name, 0) + x[..., 0].numel()
            largest[name] = max(largest.get(name, 0.0), float(x.abs().amax()))
            if x.shape[-1] > largest_gram:
                return
            if shared is None or shared[0] is not x:
                tokens = x.flatten(0, -2)
                tokens = tokens[:: math.ceil(len(tokens) / _GRAM_TOKENS)]
                shared = x, tokens.T @ tokens
            grams[name] = grams[name] + shared[1] if name in grams else shared[1]

        self.through(model, [_watch(model, name, add) for name in layers])
        return {
            name: InputStatistics((total / counts[name]).float(), largest[name], grams.get(name))
            for name, total in sums.items()
        }

    def layer_inputs(self, model: nn.Module, layer: str) -> Tensor:
        """Return the inputs [M, ..., K] of one linear layer."""
        seen: list[Tensor] = []
        self.through(model, [_watch(model, layer, lambda _, x: seen.append(x))])
        return torch.cat(seen)

    @torch.no_grad()
    def block_inputs(self, model: nn.Module, block: nn.Module) -> BlockInputs:
        """Return the inputs of `block`, the first of `model`; nothing behind it runs."""
        hidden: list[Tensor] = []
        shared: dict[str, list[Tensor]] = {}
        constants: dict[str, Any] = {}

        def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            hidden.append(args[0])
            for name, value in kwargs.items():
                if isinstance(value, Tensor):
                    shared.setdefault(name, []).append(value)
                else:
                    constants[name] = value
            raise _ReachedError

        with _removed([block.register_forward_pre_hook(keep, with_kwargs=True)]):
            for inputs in self.batches():
                try:
                    self.adapter.forward(model, inputs)
                except _ReachedError:
                    continue
        return BlockInputs(torch.cat(hidden), {name: torch.cat(parts) for name, parts in shared.items()}, constants)


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
