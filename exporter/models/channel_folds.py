"""Changes of a layer's input that cost nothing: what makes the input, and what reads it, change together.

x' = (x - shift) / divisor, channel by channel, made by the layers in front; the readers' weights are multiplied by the
divisors and their biases take the shift back, so the network computes what it did. In a modulation the new input is the
norm times 1 + scale' plus shift', with 1 + scale' = (1 + scale) / divisor and the shift as other outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Write = Callable[[nn.Module, Tensor, Sequence[Tensor]], None]
"""Change what makes the inputs: (model, divisor [K], a shift [K] for each input)."""


@dataclass(frozen=True)
class ChannelFold:
    """Inputs that share their divisors and have a shift each.

    `readers` are, for every such input, the module paths of the linear layers that read it, and nothing else does;
    `write` changes what makes the inputs, and `shifts` says whether it can shift them.
    """

    readers: tuple[tuple[str, ...], ...]
    write: Write
    shifts: bool = True

    def apply(self, model: nn.Module, divisor: Tensor, shifts: Sequence[Tensor]) -> None:
        """Give `model` inputs (x - shift) / divisor, float64 [K]; its parameters are replaced, not written to."""
        self.write(model, divisor, shifts)
        for names, shift in zip(self.readers, shifts, strict=True):
            for name in names:
                _read(_linear(model, name), divisor, shift)


def behind_linear(model: nn.Module, name: str, readers: tuple[str, ...]) -> ChannelFold:
    """The output of the linear layer `name`, which `readers` read as it is or averaged over tokens."""

    def write(model: nn.Module, divisor: Tensor, shifts: Sequence[Tensor]) -> None:
        (shift,) = shifts
        _write_rows(_linear(model, name), slice(None), divisor, shift)

    return ChannelFold((readers,), write, shifts=_linear(model, name).bias is not None)


def behind_attention(model: nn.Module, paths: Iterable[str]) -> tuple[ChannelFold, ...]:
    """What diffusers' attention modules at `paths` make of their values, for the projections behind them."""
    return tuple(behind_linear(model, f"{path}.to_v", (f"{path}.to_out.0",)) for path in paths)


def behind_norm(norm: str, readers: tuple[str, ...], added: str | None = None) -> ChannelFold:
    """The output of a norm with weight and bias, plus that of the linear layer `added`, if there is one."""

    def write(model: nn.Module, divisor: Tensor, shifts: Sequence[Tensor]) -> None:
        (shift,) = shifts
        module = model.get_submodule(norm)
        _replace(module, "weight", _exact(module.get_parameter("weight")) / divisor)
        _replace(module, "bias", (_exact(module.get_parameter("bias")) - shift) / divisor)
        if added is not None:
            _write_rows(_linear(model, added), slice(None), divisor)

    return ChannelFold((readers,), write)


def behind_own_modulation(embedder: str, row: int, readers: tuple[str, ...]) -> ChannelFold:
    """adaLN-zero (DiT): a norm, times 1 + scale, plus shift: parts `row` + 1 and `row` of the embedder's output."""

    def write(model: nn.Module, divisor: Tensor, shifts: Sequence[Tensor]) -> None:
        for part, moved in ((row, shifts[0]), (row + 1, divisor - 1)):
            # 1 + scale' = (1 + scale) / divisor is scale' = (scale - (divisor - 1)) / divisor.
            _write_rows(_linear(model, embedder), _part(part, len(divisor)), divisor, moved)

    return ChannelFold((readers,), write)


def behind_shared_modulation(
    embedder: str, tables: Sequence[str], row: int, readers: Sequence[tuple[str, ...]]
) -> ChannelFold:
    """adaLN-single (PixArt): as adaLN-zero, with one embedder for all blocks and a table [R, K] in each to add.

    So the divisors are the same in all blocks.
    """

    def write(model: nn.Module, divisor: Tensor, shifts: Sequence[Tensor]) -> None:
        for part in (row, row + 1):
            _write_rows(_linear(model, embedder), _part(part, len(divisor)), divisor)
        for path, shift in zip(tables, shifts, strict=True):
            module, _, name = path.rpartition(".")
            table = _exact(model.get_parameter(path))
            table[row : row + 2] = (table[row : row + 2] - torch.stack([shift, divisor - 1])) / divisor
            _replace(model.get_submodule(module), name, table)

    return ChannelFold(tuple(readers), write)


def _part(index: int, width: int) -> slice:
    return slice(index * width, (index + 1) * width)


def _write_rows(linear: nn.Linear, rows: slice, divisor: Tensor, shift: Tensor | None = None) -> None:
    """Outputs at `rows`: (y - shift) / divisor."""
    weight = _exact(linear.weight)
    weight[rows] /= divisor.unsqueeze(1)
    _replace(linear, "weight", weight)
    if linear.bias is None:
        return
    bias = _exact(linear.bias)
    bias[rows] = (bias[rows] if shift is None else bias[rows] - shift) / divisor
    _replace(linear, "bias", bias)


def _read(linear: nn.Linear, divisor: Tensor, shift: Tensor) -> None:
    """Take the input (x - shift) / divisor for x."""
    weight = _exact(linear.weight)
    if linear.bias is not None:
        _replace(linear, "bias", _exact(linear.bias) + weight @ shift)
    _replace(linear, "weight", weight * divisor)


def _exact(parameter: Tensor) -> Tensor:
    """A float64 copy."""
    return parameter.detach().to(torch.float64, copy=True)


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    before = module.get_parameter(name)
    setattr(module, name, nn.Parameter(value.to(before), requires_grad=before.requires_grad))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name}: {type(module).__name__} is no linear layer")
    return module
