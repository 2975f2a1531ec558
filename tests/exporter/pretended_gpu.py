"""A GPU that is not there: tensors that say they are on one and compute on the CPU, and refuse what a GPU would.

An operation on tensors of both devices raises, as on a real GPU, unless those on the CPU are single numbers or indices.
The device is PyTorch's "lazy", which builds without CUDA know, too, and which nothing else uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

GPU = torch.device("lazy", 0)

_aten = torch.ops.aten
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default)
_MATH = 0
"""Of the ways to compute attention the one in plain operations: the CPU's fast one is not a GPU's."""


class OnGpu(Tensor):
    """A tensor that says it is on the GPU; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=GPU
        )
        made.held = held.detach()
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _compute(func, args, dict(kwargs or {}))


class PretendedGpu(TorchDispatchMode):
    """Inside, tensors can be on the GPU; `operations` counts what was computed there."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self._constants = _Constants()

    def __enter__(self) -> PretendedGpu:
        super().__enter__()
        self._constants.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._constants.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.operations += any(isinstance(leaf, OnGpu) for leaf in pytree.tree_leaves((args, kwargs)))
        return _compute(func, args, dict(kwargs or {}))


class _Constants(TorchFunctionMode):
    """Make `torch.tensor(numbers, device=…)` in two steps: it is not dispatched as one."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.tensor and "device" in given:
            device = given.pop("device")
            return torch.tensor(*args, **given).to(device)
        return func(*args, **given)


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    device = kwargs.get("device")
    there = any(isinstance(tensor, OnGpu) for tensor in tensors) if device is None else device.type == GPU.type
    if device is not None:
        kwargs["device"] = torch.device("cpu")
    elif there and func is not _aten.copy_.default:
        _refuse_mixtures(func, args, tensors)
    if there and func is _aten._fused_sdp_choice.default:
        return _MATH
    plain_args, plain_kwargs = pytree.tree_map_only(OnGpu, lambda tensor: tensor.held, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if func is _aten._local_scalar_dense.default:
        return result
    if func is _aten.copy_.default:
        return args[0]
    if not there:
        return result
    result = pytree.tree_map_only(Tensor, OnGpu, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if device is None else result


def _refuse_mixtures(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    if func in _INDEXING:
        tensors = [args[0], *args[2:3]]
    strange = [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and tensor.ndim]
    if strange:
        raise RuntimeError(f"{func}: a tensor {list(strange[0].shape)} on the CPU beside tensors on {GPU}")
