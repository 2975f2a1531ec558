"""Which blocks of a transformer are the same module with other weights."""

from __future__ import annotations

import types
from collections.abc import Hashable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Facts: TypeAlias = Hashable

_PLAIN = (bool, int, float, complex, bytes, type(None), type, types.FunctionType, torch.dtype, torch.device)
# What nn.Module keeps for itself; parameters, buffers and submodules are looked at as such.
_OWN_STATE = frozenset(nn.Module().__dict__) - {"training"}


def block_facts(path: str, block: nn.Module) -> Facts:
    """Everything about a block but its numbers; two blocks with equal facts compute the same function of their
    parameters, buffers and arguments.

    Names that begin with the block's own `path`, such as those of its quantized layers, count relative to it. What
    cannot be compared, such as a tensor that is neither parameter nor buffer, counts as itself.
    """
    facts: list[Facts] = []
    for name, module in block.named_modules(remove_duplicate=False):
        state = {key: value for key, value in vars(module).items() if key not in _OWN_STATE}
        hooks = tuple(_facts(path, hook) for hook in module._forward_pre_hooks.values())
        facts.append((name, type(module), _facts(path, state), hooks))
    for name, tensor in block_tensors(block).items():
        facts.append((name, tuple(tensor.shape), tensor.dtype))
    return tuple(facts)


def block_tensors(block: nn.Module) -> dict[str, Tensor]:
    """A block's parameters and buffers by their paths in it, shared ones under each."""
    return {
        **dict(block.named_parameters(remove_duplicate=False)),
        **dict(block.named_buffers(remove_duplicate=False)),
    }


def _facts(path: str, value: Any, inside: tuple[int, ...] = ()) -> Facts:
    if isinstance(value, str):
        return ("text", value.removeprefix(path) if f"{value}.".startswith(f"{path}.") else f"={value}")
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, Tensor | nn.Module) or id(value) in inside:
        return ("object", id(value))
    inside = (*inside, id(value))
    if isinstance(value, Mapping):
        return (type(value), tuple((_facts(path, key), _facts(path, item, inside)) for key, item in value.items()))
    if isinstance(value, tuple | list):
        return (type(value), tuple(_facts(path, item, inside) for item in value))
    if hasattr(value, "__dict__"):
        return (type(value), _facts(path, vars(value), inside))
    return ("object", id(value))
