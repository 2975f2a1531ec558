"""A linear layer that is more than one product: a rotation in front of it, a branch of low rank beside it, a quantizer
behind it."""

from __future__ import annotations

from torch import Tensor, nn

from exporter.transforms.hadamard import hadamard, rotate
from exporter.transforms.low_rank import LowRank


class TransformedLinear(nn.Module):
    """y = linear(x·H) + (x·downᵀ)·upᵀ: what a linear layer computes, with its weight in two parts.

    `linear` is the layer that gets quantized, its weight that of the original less up·down, then rotated; it has the
    bias. H is block-diagonal, its blocks the one matrix of that size, so that layers which read the same input share
    the product in the graph. Without `hadamard` there is no rotation, without `low_rank` no branch. Once the layer is
    quantized, `quantizer` may round its output, which otherwise stays as it is.
    """

    rotation: Tensor | None
    quantizer: nn.Module | None

    def __init__(self, original: nn.Linear, hadamard_size: int = 0, low_rank: LowRank | None = None) -> None:
        super().__init__()
        weight = original.weight.detach()
        if low_rank is not None:
            weight = low_rank.remainder(weight)
        self.register_buffer("rotation", hadamard(hadamard_size) if hadamard_size else None, persistent=False)
        if self.rotation is not None:
            weight = rotate(weight.double(), self.rotation.double()).to(weight)
        self.linear = _linear(weight, original.bias)
        self.low_rank = None if low_rank is None else nn.Sequential(_linear(low_rank.down), _linear(low_rank.up))
        self.quantizer = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N]."""
        y: Tensor = self.linear(x if self.rotation is None else rotate(x, self.rotation))
        if self.low_rank is not None:
            y = y + self.low_rank(x)
        return y if self.quantizer is None else self.quantizer(y)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A frozen linear layer with these numbers."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
