"""The torch model as an engine with FP16 or BF16 tensors would run it: how much that alone moves its results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from exporter.compute import Compute
from exporter.quantize import QuantLinear

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What they read and write is stored between operators; sinusoids of the timestep are computed in FP32.
_STORING = (nn.Linear, QuantLinear, nn.LayerNorm, nn.Conv2d, nn.SiLU)


def rounded(tensor: Tensor, compute: Compute) -> Tensor:
    """A float32 tensor rounded to the compute type and back."""
    return tensor.to(_DTYPES[compute]).to(torch.float32)


@contextmanager
def stored_in(compute: Compute, model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
    """While the context lasts, linears, norms, convolutions and blocks of `model` read and write rounded tensors.

    Weights in high precision are rounded as well, and put back afterwards.
    """

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return tuple(_if_float(one, compute) for one in args), {
            name: _if_float(one, compute) for name, one in kwargs.items()
        }

    def after(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return rounded(output, compute)

    outer = {id(block) for _, block in blocks}
    with ExitStack() as hooks:
        for parameter in _stored_parameters(model):
            hooks.callback(setattr, parameter, "data", parameter.data)
            parameter.data = rounded(parameter.data, compute)
        for module in model.modules():
            if isinstance(module, _STORING) or id(module) in outer:
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after).remove)
        yield


def _stored_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights and biases of the layers that stay in high precision."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield from module.parameters(recurse=False)


def _if_float(value: Any, compute: Compute) -> Any:
    return rounded(value, compute) if isinstance(value, Tensor) and value.dtype == torch.float32 else value
