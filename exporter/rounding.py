"""Round torch tensors onto a format's grid: bitwise what `plugins.formats` does in numpy, fast enough for training.

Tensors are float32 and in units of their scale throughout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
    x = x.clamp(-fmt.max, fmt.max)
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
    exponent_below_first_code = int(math.log2(fmt.min_normal)) + _FLOAT32_BIAS - 1
    code_parity = ((bits >> _FRACTION_BITS) - exponent_below_first_code) & 1
    half = 1 << (_FRACTION_BITS - 1)
    rounded = (bits + (half - 1) + code_parity) & (_SIGN_MASK | _EXPONENT_MASK)
    below = (x / fmt.min_normal).round_().mul_(fmt.min_normal)
    return torch.where(x.abs() < fmt.min_normal, below, rounded.view(torch.float32))


def quantize_online(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Quantize every token (last axis) of `x` with its own scale: (values on the unit grid [..., K], scales [..., 1]).

    scale = max(amax, TINY) / fmt.max, values = round(x / scale), both true float32 divisions; every zero is +0.
    """
    amax = x.abs().amax(dim=-1, keepdim=True).clamp_(min=TINY)
    # A tensor divisor: CUDA multiplies by the reciprocal of a Python number, which is not the same float.
    scales = amax / torch.full_like(amax, fmt.max)
    return round_to_format(x / scales, fmt).add_(0.0), scales


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, fmt: Format) -> Tensor:
        values, scales = quantize_online(x, fmt)
        return values.mul_(scales)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def fake_quantize_online(x: Tensor, fmt: Format) -> Tensor:
    """Quantize and dequantize `x` per token; its gradient passes straight through to `x`."""
    return _StraightThrough.apply(x, fmt)  # type: ignore[no-any-return,no-untyped-call]
