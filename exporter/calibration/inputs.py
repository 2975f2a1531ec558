"""What reaches a layer or a block when a model runs over the calibration set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from exporter.calibration.activations import ActivationStore, BatchLimit
from exporter.calibration.block_inputs import BlockInputs
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.input_statistics import InputStatistics, InputSums
from exporter.calibration.placement import Placement
from exporter.calibration.transfers import Gathered
from exporter.models.adapter import Adapter
from exporter.models.inputs import HIDDEN_STATES
from exporter.models.prompts import Prompts
from exporter.shards import Shard


@dataclass(frozen=True)
class CalibrationRun:
    """The calibration set with its prompts and the family's way of calling a model.

    `store` says where activations of all samples are kept, `limit` how many samples go through a model at once, and
    `placement` where it computes. Of several processes each has every `world`-th sample. `weights` float32 [M] are what
    the squared errors of all samples count, None for all alike. `memory` is how many bytes there may be at once of Gram
    matrices and, on a CPU, of what learning a block takes; None for any number.
    """

    adapter: Adapter
    calibration_set: CalibrationSet
    prompts: Prompts
    store: ActivationStore = field(default_factory=ActivationStore)
    limit: BatchLimit = field(default_factory=BatchLimit)
    shard: Shard = field(default_factory=Shard)
    placement: Placement = field(default_factory=Placement)
    weights: Tensor | None = None
    memory: int | None = None

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
    def through(self, model: nn.Module, watchers: Mapping[str, Callable[[Tensor], None]]) -> None:
        """Run `model` over this process's samples, in order and some at once, and let the watcher of every layer that
        has one see its input [B, ..., K], each sample once."""
        seen = dict.fromkeys(watchers, 0)
        part = slice(0)

        def see(name: str, x: Tensor) -> None:
            # Where memory did not suffice for the layers behind this one, it sees the same samples again.
            again = len(x) * (seen[name] - part.start) // (part.stop - part.start)
            if again < len(x):
                watchers[name](x[again:] if again else x)
                seen[name] = part.stop

        def step(next_part: slice) -> None:
            nonlocal part
            part = next_part
            self._forward(model, part)

        self._run(model, [_watch(model, name, see) for name in watchers], step)

    def _run(self, model: nn.Module, hooks: Iterable[RemovableHandle], step: Callable[[slice], None]) -> None:
        """`step` on all samples, some at once, with the model where it is to compute; then remove the hooks."""
        with _removed(hooks), self.placement.holds_model(model, self.adapter.blocks(model)):
            self.limit.each(self.samples, self.tokens(model), step)

    def _forward(self, model: nn.Module, part: slice) -> None:
        inputs = self.calibration_set.inputs(self._indices[part], self.prompts)
        self.adapter.forward(model, inputs.to(self.placement.device))

    def tokens(self, model: nn.Module) -> int:
        """Tokens of a sample."""
        channels, height, width = self.calibration_set.hidden_states.shape[1:]
        return self.adapter.tokens(model, (channels, height, width))

    @torch.no_grad()
    def order(self, model: nn.Module, layers: Iterable[str]) -> list[str]:
        """Those of `layers` that run, in order of first execution: found with one sample."""
        seen: dict[str, None] = {}
        watched = [_watch(model, name, lambda layer, _: seen.setdefault(layer)) for name in layers]
        with _removed(watched), self.placement.holds_model(model, self.adapter.blocks(model)):
            self._forward(model, slice(0, 1))
        return list(seen)

    def input_statistics(
        self, model: nn.Module, layers: Iterable[str], largest_gram: int = 0
    ) -> dict[str, InputStatistics]:
        """Return what is known of every layer's input, in order of first execution.

        Gram matrices are made for layers of at most `largest_gram` inputs, of all tokens where they are few, otherwise
        of tokens spread evenly over the set.
        """
        statistics = InputSums(
            len(self.calibration_set), largest_gram, self.shard, self.weights, self.placement.room_for_grams
        )
        self.through(model, {name: partial(statistics.add, name) for name in layers})
        return statistics.result()

    @torch.no_grad()
    def layer_inputs(self, model: nn.Module, layer: str) -> Tensor:
        """Return the inputs [M, ..., K] of one linear layer."""
        seen: list[Tensor] = []
        gathered = Gathered(self.samples, self.store)

        def step(part: slice) -> None:
            seen.clear()
            self._forward(model, part)
            gathered.put(part, seen[0])

        self._run(model, [_watch(model, layer, lambda _, x: seen.append(x))], step)
        return gathered.tensor

    @torch.no_grad()
    def block_inputs(self, model: nn.Module, block: nn.Module) -> BlockInputs:
        """Return the inputs of `block`, the first of `model`; nothing behind it runs."""
        seen: dict[str, Tensor] = {}
        constants: dict[str, Any] = {}
        gathered: dict[str, Gathered] = {}

        def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            seen[HIDDEN_STATES] = args[0]
            for name, value in kwargs.items():
                (seen if isinstance(value, Tensor) else constants)[name] = value
            raise _ReachedError

        def step(part: slice) -> None:
            with contextlib.suppress(_ReachedError):
                self._forward(model, part)
            for name, value in seen.items():
                gathered.setdefault(name, Gathered(self.samples, self.store)).put(part, value)

        self._run(model, [block.register_forward_pre_hook(keep, with_kwargs=True)], step)
        hidden = gathered.pop(HIDDEN_STATES).tensor
        shared = {name: parts.tensor for name, parts in gathered.items()}
        return BlockInputs(hidden, shared, constants, device=self.placement.device, weights=self.own_weights)


class _ReachedError(Exception):
    """The forward pass has come to the block whose inputs are wanted; the rest of it would be thrown away."""


def _watch(model: nn.Module, layer: str, see: Callable[[str, Tensor], object]) -> RemovableHandle:
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
