"""A linear layer that is more than one product: a rotation or a shift in front of it, a branch of low rank beside it, a
quantizer behind it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

from exporter.transforms.hadamard import hadamard, rotate
from exporter.transforms.low_rank import LowRank

SHIFTS: Mapping[str, float] = MappingProxyType({"none": 0.0, "gelu": 175 / 1024})
"""What is added to an input. A GELU's least value is -0.16997, that of its tanh approximation -0.17004; the shift is
the next number beyond that FP16 and BF16 hold."""


class TransformedLinear(nn.Module):
    """y = linear(x·H + shift) + (x·downᵀ)·upᵀ: what a linear layer computes, with its weight in two parts.

    `linear` is the layer that gets quantized, its weight that of the original less up·down, then rotated; it has the
    bias. H is block-diagonal, its blocks the one matrix of that size, so that layers which read the same input share
    the product in the graph. Without `hadamard` there is no rotation, without `low_rank` no branch. A `shift` is
    taken back by the bias, which the layer gets if it has none. Once the layer is quantized, `quantizer` may round
    its output, which otherwise stays as it is.
    """

    rotation: Tensor | None
    quantizer: nn.Module | None

    def __init__(
        self, original: nn.Linear, hadamard_size: int = 0, low_rank: LowRank | None = None, shift: float = 0.0
    ) -> None:
        super().__init__()
        weight = original.weight.detach()
        if low_rank is not None:
            weight = low_rank.remainder(weight)
        self.register_buffer("rotation", hadamard(hadamard_size) if hadamard_size else None, persistent=False)
        if self.rotation is not None:
            weight = rotate(weight.double(), self.rotation.double()).to(weight)
        self.shift = shift
        self.linear = frozen_linear(weight, _shifted_bias(weight, original.bias, shift) if shift else original.bias)
        self.low_rank = (
            None if low_rank is None else nn.Sequential(frozen_linear(low_rank.down), frozen_linear(low_rank.up))
        )
        self.quantizer = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N]."""
        read = x if self.rotation is None else rotate(x, self.rotation)
        y: Tensor = self.linear(read + self.shift if self.shift else read)
        if self.low_rank is not None:
            y = y + self.low_rank(x)
        return y if self.quantizer is None else self.quantizer(y)


def _shifted_bias(weight: Tensor, bias: Tensor | None, shift: float) -> Tensor:
    """The bias [N] with which x + shift gives what x did, rounded once."""
    exact = weight.double()
    before = exact.new_zeros(len(exact)) if bias is None else bias.detach().double()
    return (before - shift * exact.sum(dim=1)).to(weight)


def frozen_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A frozen linear layer with these numbers."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
