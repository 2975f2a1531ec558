"""What goes into a transformer: named tensors, and what is known of those that follow the prompt."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

HIDDEN_STATES = "hidden_states"
TIMESTEP = "timestep"


@dataclass(frozen=True)
class TransformerInputs:
    """One batch for the transformer.

    hidden_states float32 [B, C, H, W] (scaled by the scheduler), timestep float32 [B]; `conditions` are all other
    inputs by their names, [B, ...] each: float32, class labels int64. The names are those of the transformer's own
    parameters and of the exported graph's inputs.
    """

    hidden_states: Tensor
    timestep: Tensor
    conditions: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """How many samples."""
        return int(self.hidden_states.shape[0])

    def as_dict(self) -> dict[str, Tensor]:
        """Input name → tensor."""
        return {HIDDEN_STATES: self.hidden_states, TIMESTEP: self.timestep, **self.conditions}

    def to(self, device: torch.device) -> TransformerInputs:
        """The same on a device."""
        return self.from_dict({name: tensor.to(device) for name, tensor in self.as_dict().items()})

    def as_numpy(self) -> dict[str, npt.NDArray[Any]]:
        """The same as contiguous arrays, as runtimes take them."""
        return {name: np.ascontiguousarray(tensor.numpy(force=True)) for name, tensor in self.as_dict().items()}

    def __getitem__(self, index: slice | Tensor) -> TransformerInputs:
        """The samples of the batch that a slice or an index tensor picks."""
        return self.from_dict({name: tensor[index] for name, tensor in self.as_dict().items()})

    @classmethod
    def from_dict(cls, tensors: Mapping[str, Tensor]) -> TransformerInputs:
        """The inverse of `as_dict`."""
        rest = {name: tensor for name, tensor in tensors.items() if name not in (HIDDEN_STATES, TIMESTEP)}
        return cls(tensors[HIDDEN_STATES], tensors[TIMESTEP], rest)

    @classmethod
    def concatenate(cls, parts: Sequence[TransformerInputs]) -> TransformerInputs:
        """One batch out of several of the same kind."""
        batches = [part.as_dict() for part in parts]
        return cls.from_dict({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})


def shared_inputs(arguments: Mapping[str, Any], skips: Collection[str]) -> dict[str, Tensor]:
    """Of a block's keyword arguments the float tensors that all blocks take: all but those that come by `skips`."""
    return {
        name: value
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point() and name not in skips
    }


@dataclass(frozen=True)
class Condition:
    """An input that follows the prompt.

    `input` is its name as an input, `key` as a tensor of the prompts file (there also ``negative_<key>``); `shape` is
    one prompt's, with None for a length that the file decides. Embeddings are any floats; a mask is 1 for a token and 0
    for padding, and `of` names the embeddings' key that it belongs to; a label is an integer from 0 to `classes` - 1.
    """

    input: str
    key: str
    shape: tuple[int | None, ...]
    kind: Literal["embeddings", "mask", "label"] = "embeddings"
    of: str = ""
    classes: int = 0

    @property
    def negative_key(self) -> str:
        """The prompts file's name for what goes without a prompt."""
        return f"negative_{self.key}"

    def random(self, batch: int, tokens: int, generator: torch.Generator) -> Tensor:
        """A batch of such inputs: noise, masks of ones, labels; `tokens` is the length where the file decides."""
        shape = [batch, *(tokens if size is None else size for size in self.shape)]
        if self.kind == "label":
            return torch.randint(self.classes, shape, generator=generator)
        return torch.ones(shape) if self.kind == "mask" else torch.randn(shape, generator=generator)
