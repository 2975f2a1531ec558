"""Linear layers that the exporter does not make: inputs with a zero point, and weights of the published loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from exporter.quantize import QuantLinear, share_copy
from exporter.rounding import InputQuantizer
from exporter.transforms.linear import frozen_linear
from plugins.float_quantize.reference import TINY
from plugins.formats import get_format
from tools.quality_cells.published_loop import PublishedLinear


class QuantizedInput(nn.Module):
    """A layer behind a quantizer of its input."""

    def __init__(self, quantize: Callable[[Tensor], Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.quantize, self.layer = quantize, layer

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N]."""
        y: Tensor = self.layer(self.quantize(x))
        return y


def quantize_with_zero_point(x: Tensor, bits: int) -> Tensor:
    """x [..., K] rounded to 2^bits even steps between each token's least and largest number, 0 being one of them."""
    least, largest = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    last = 2**bits - 1
    step = ((largest - least) / last).clamp(min=TINY)
    zero = (-least / step).round()
    codes = (x / step).round().add_(zero).clamp_(0, last)
    quantized: Tensor = codes.sub_(zero).mul_(step)
    return quantized


@torch.no_grad()
def with_zero_points(model: nn.Module) -> nn.Module:
    """The quantized model with its inputs, which are integers around zero, quantized with zero points instead."""
    changed = share_copy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            quantize = partial(quantize_with_zero_point, bits=get_format(layer.activation_format).bits)
            changed.set_submodule(name, QuantizedInput(quantize, frozen_linear(layer.weight, layer.bias)))
    return changed.eval()


@torch.no_grad()
def with_decoded_weights(model: nn.Module) -> nn.Module:
    """The quantized model computing the same with weights that are decoded once, which is faster on a GPU."""
    changed = share_copy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            decoded: nn.Module = frozen_linear(layer.weight, layer.bias)
            if layer.activation_format != "none":
                quantizer = InputQuantizer(get_format(layer.activation_format), layer.scaling, layer.input_scale)
                decoded = QuantizedInput(quantizer.fake_quantize, decoded)
            changed.set_submodule(name, decoded)
    return changed.eval()


@torch.no_grad()
def rounded_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that the published loop has rounded, by layer."""
    return {name: layer.quantized() for name, layer in model.named_modules() if isinstance(layer, PublishedLinear)}


@torch.no_grad()
def with_quantized_inputs(model: nn.Module, weights: Mapping[str, Tensor], activation: str) -> nn.Module:
    """A model whose layers have these weights, and inputs that are quantized online to the format `activation`."""
    changed = share_copy(model)
    quantize = InputQuantizer(get_format(activation)).fake_quantize
    for name, weight in weights.items():
        bias = model.get_submodule(name).bias
        changed.set_submodule(name, QuantizedInput(quantize, frozen_linear(weight, cast("Tensor | None", bias))))
    return changed.eval()
