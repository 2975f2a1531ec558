"""The torch model as an engine with FP16 or BF16 tensors would run it: how much that alone moves its results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from exporter.compute import Compute
from exporter.output_quantizer import OutputQuantizer
from exporter.quantize import QuantLinear

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What they read is stored in the compute type, even where it comes straight from the model's inputs.
_READING = (nn.Linear, QuantLinear, nn.Conv2d)
# Computed in FP32; their results are stored in the compute type.
_EXACT = (QuantLinear, OutputQuantizer, Timesteps)


def rounded(tensor: Tensor, compute: Compute) -> Tensor:
    """A float32 tensor rounded to the compute type and back."""
    return tensor.to(_DTYPES[compute]).to(torch.float32)


@contextmanager
def stored_in(
    compute: Compute, model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], products: Compute = "fp32"
) -> Iterator[None]:
    """While the context lasts, every operation on float32 tensors rounds its result to the compute type.

    Except inside quantized linears, but for their products, which are rounded to `products`, and where the timestep's
    sinusoids are made. What quantized linears, other layers
    with weights and blocks read is rounded, too, and so are weights in high precision, which are put back afterwards.
    """
    mode = _RoundResults(compute)

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return tuple(_if_float(one, compute) for one in args), {
            name: _if_float(one, compute) for name, one in kwargs.items()
        }

    def enter(_module: nn.Module, _args: Any) -> None:
        mode.exact += 1

    def leave(module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        if isinstance(module, QuantLinear):
            output = _with_rounded_product(module, output, products)
        mode.exact -= 1
        return rounded(output, compute)

    outer = {id(block) for _, block in blocks}
    with ExitStack() as stack:
        for parameter in _stored_parameters(model):
            stack.callback(setattr, parameter, "data", parameter.data)
            parameter.data = rounded(parameter.data, compute)
        for module in model.modules():
            if isinstance(module, _READING) or id(module) in outer:
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            if isinstance(module, _EXACT):
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(mode)
        yield


def _with_rounded_product(module: QuantLinear, output: Tensor, products: Compute) -> Tensor:
    """The output as it is when the product, without the bias, is rounded; its scale only moves where binades end."""
    if products == "fp32":
        return output
    bias = torch.zeros(()) if module.bias is None else module.bias
    return rounded(output - bias, products) + bias


class _RoundResults(TorchFunctionMode):
    """Rounds what torch functions return, unless `exact` is positive."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.compute: Compute = compute
        self.exact = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.exact:
            return result
        if isinstance(result, tuple | list):
            return type(result)(_if_float(one, self.compute) for one in result) if _plain(result) else result
        return _if_float(result, self.compute)


def _plain(result: Any) -> bool:
    """Whether a sequence can be made again from its elements: torch's own named tuples cannot."""
    return type(result) in (tuple, list)


def _stored_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights and biases of the layers that stay in high precision."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield from module.parameters(recurse=False)


def _if_float(value: Any, compute: Compute) -> Any:
    return rounded(value, compute) if isinstance(value, Tensor) and value.dtype == torch.float32 else value
