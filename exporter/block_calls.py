"""What a transformer's block is called with, apart from the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# torch.export takes sizes 0 and 1 for constants.
_EXAMPLE_BATCH = 2


class NotRepeatedError(ValueError):
    """The blocks are not a few kinds that can be traced one by one; the message says why."""


@dataclass(frozen=True)
class TensorArgument:
    """A tensor that a block is called with: sizes, None for the batch."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype

    def example(self) -> Tensor:
        """A tensor like it."""
        return torch.zeros([_EXAMPLE_BATCH if size is None else size for size in self.shape], dtype=self.dtype)


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with: the leaves of (args, kwargs), tensors as `TensorArgument`, and their structure."""

    leaves: tuple[Any, ...]
    structure: pytree.TreeSpec

    @classmethod
    def of(cls, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[BlockCall, list[Tensor]]:
        """How block `path` is called, and the tensors. Raises `NotRepeatedError` for a call that cannot be copied."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not (args and tensors and args[0] is tensors[0]):
            raise NotRepeatedError(f"{path} does not take the hidden states as its first argument")
        described = tuple(
            _described(path, leaf, tensors[0].shape[0]) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        )
        return cls(described, structure), tensors

    @property
    def tensors(self) -> list[TensorArgument]:
        """The tensors among the leaves, in order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorArgument)]

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with `tensors` in their places."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, TensorArgument) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return args, kwargs


def _described(path: str, tensor: Tensor, batch: int | torch.SymInt) -> TensorArgument:
    sizes: list[int | None] = []
    for size in tensor.shape:
        if isinstance(size, torch.SymInt):
            if size != batch:
                raise NotRepeatedError(f"{path} takes a tensor with an axis of {size}, which is not the batch")
            sizes.append(None)
        else:
            sizes.append(int(size))
    return TensorArgument(tuple(sizes), tensor.dtype)
