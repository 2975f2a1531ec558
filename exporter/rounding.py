"""Round torch tensors onto a format's grid: bitwise what `plugins.formats` does in numpy, fast enough for training.

Tensors are float32 and in units of their scale throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from plugins.block_scales import BlockScaling
from plugins.float_quantize.reference import TINY
from plugins.formats import Format, IntFormat

_SIGN_MASK = -(2**31)
_EXPONENT_MASK = 0x7F800000
_FRACTION_BITS = 23
_FLOAT32_BIAS = 127


def round_to_format(x: Tensor, fmt: Format) -> Tensor:
    """Round `x` (float32, any shape) to the nearest value of `fmt`: ties to the even code, saturating.

    For every format that weights and activations may have. Floats keep the sign of a zero; NaN stays NaN.
    """
    x = x.clamp(fmt.min, fmt.max)
    if fmt.mantissa_bits == 0:
        return _round_to_power_of_two(x, fmt)
    if fmt.is_uniform:
        rounded = x.div_(fmt.step).round_().mul_(fmt.step)
        # Integers have no code for -0.0; adding +0.0 turns it into +0.0.
        return rounded.add_(0.0) if isinstance(fmt, IntFormat) else rounded
    step = element_step(x, fmt)
    return x.div_(step).round_().mul_(step)


def element_step(x: Tensor, fmt: Format) -> Tensor:
    """Return the distance between `fmt`'s neighbours in the binade of every element of `x`.

    2^(max(⌊log2|x|⌋, emin) − M), with the logarithm read from the float's own exponent, so it is exact (FP4DiT,
    arXiv 2503.15465, its quantizer's s). For integers it is 1 everywhere within their range.
    """
    return power_of_two_below(x).clamp_(min=fmt.min_normal).mul_(2.0**-fmt.mantissa_bits)


def power_of_two_below(x: Tensor) -> Tensor:
    """Return 2^⌊log2|x|⌋ of every float32 element, exactly; 0 for zeros and subnormals."""
    return (x.contiguous().view(torch.int32) & _EXPONENT_MASK).view(torch.float32)


def _round_to_power_of_two(x: Tensor, fmt: Format) -> Tensor:
    """Round where M = 0: every value is a power of two, so the even code is an even EXPONENT, not an even multiple.

    Adds half a binade to the float's bits, one unit less where the value below has an even code, and truncates.
    """
    bits = x.view(torch.int32)
    code_parity = ((bits >> _FRACTION_BITS) - exponent_below_first_code(fmt)) & 1
    half = 1 << (_FRACTION_BITS - 1)
    rounded = (bits + (half - 1) + code_parity) & (_SIGN_MASK | _EXPONENT_MASK)
    below = (x / fmt.min_normal).round_().mul_(fmt.min_normal)
    return torch.where(x.abs() < fmt.min_normal, below, rounded.view(torch.float32))


def exponent_below_first_code(fmt: Format) -> int:
    """The exponent field of float32 below that of the format's smallest power of two: codes count from there."""
    return int(math.log2(fmt.min_normal)) + _FLOAT32_BIAS - 1


def quantize_online(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Quantize every token (last axis) of `x` with its own scale: (values on the unit grid [..., K], scales [..., 1]).

    scale = max(amax, TINY) / fmt.max, values = round(x / scale), both true float32 divisions; every zero is +0.
    Negative numbers of an unsigned format count as 0.
    """
    amax = (x.abs() if fmt.min else x).amax(dim=-1, keepdim=True).clamp(min=TINY)
    # A tensor divisor: CUDA multiplies by the reciprocal of a Python number, which is not the same float.
    scales = amax / torch.full_like(amax, fmt.max)
    return round_to_format(x / scales, fmt).add_(0.0), scales


def quantize_blocks(x: Tensor, scaling: BlockScaling, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize groups along the last axis: (values on the unit grid [..., K], scales [..., K/G]).

    Bitwise what `plugins.block_quantize.reference` defines; `tensor_scale` is a scalar where the scaling has one.
    Raises `ValueError` where it is missing, or given to a scaling without.
    """
    if (tensor_scale is not None) != scaling.has_tensor_scale:
        raise ValueError(f"{scaling.name} {'needs a' if scaling.has_tensor_scale else 'has no'} scale of the tensor")
    grouped = x.reshape(*x.shape[:-1], -1, scaling.group_size)
    amax = grouped.abs().amax(dim=-1, keepdim=True)
    largest = torch.full_like(amax, scaling.values.max)
    if tensor_scale is None:
        scales = power_of_two_above(amax.clamp_(min=TINY) / largest)
    else:
        scales = round_to_format(amax / largest / tensor_scale, scaling.scales).mul_(tensor_scale)
    divisor = torch.where(scales == 0, torch.inf, scales)
    values = round_to_format(grouped / divisor, scaling.values).add_(0.0)
    return values.flatten(-2), scales.squeeze(-1)


def power_of_two_above(x: Tensor) -> Tensor:
    """Return the smallest power of two that is at least x, for every positive normal float32 element."""
    below = power_of_two_below(x)
    return torch.where(below < x, below * 2, below)


@dataclass(frozen=True)
class InputQuantizer:
    """How a layer's input is quantized: per token, or in blocks with the input's static `tensor_scale`."""

    format: Format
    scaling: BlockScaling | None = None
    tensor_scale: Tensor | None = None

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(values on the unit grid [..., K], scales [..., 1] or [..., K/G])."""
        if self.scaling is None:
            return quantize_online(x, self.format)
        return quantize_blocks(x, self.scaling, self.tensor_scale)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Quantize and dequantize `x`; its gradient passes straight through to `x`."""
        return _StraightThrough.apply(x, self)  # type: ignore[no-any-return,no-untyped-call]


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """values [..., K] · scales [..., G], each scale for K/G neighbours."""
    if scales.shape[-1] == 1:
        return values * scales
    grouped = values.reshape(*scales.shape, -1)
    return (grouped * scales.unsqueeze(-1)).flatten(-2)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, quantizer: InputQuantizer) -> Tensor:
        return dequantize(*quantizer.quantize(x))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
