"""The part of a weight that a few directions make up, for a branch in high precision (SVDQuant, arXiv 2411.05007)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """`up` [N, R] times `down` [R, K], both float32 numbers that FP16 holds."""

    up: Tensor
    down: Tensor

    def remainder(self, weight: Tensor) -> Tensor:
        """What `weight` [N, K] has beyond the product, rounded once."""
        return (weight.double() - self.up.double() @ self.down.double()).to(weight)


def factorize(weight: Tensor, rank: int) -> LowRank:
    """The product of that rank which is nearest to `weight` [N, K], but for the rounding of its factors to FP16.

    `up` has orthonormal columns before it is rounded, so that what lies between the two products is no larger than
    their result; `down` then makes the best of the rounded `up`. What the inputs are like is not asked: the errors of
    quantized weights and of quantized inputs both follow the size of what is left of the weight.
    """
    exact = weight.double()
    up = _leading(exact, rank).half().float()
    down = torch.linalg.lstsq(up.double(), exact).solution.half().float()
    return LowRank(up.contiguous(), down.contiguous())


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The first `rank` left singular vectors [N, rank], by the eigenvectors of the smaller Gram matrix."""
    rows, columns = matrix.shape
    is_wide = rows <= columns
    _, vectors = torch.linalg.eigh(matrix @ matrix.T if is_wide else matrix.T @ matrix)
    leading: Tensor = vectors[:, -rank:].flip(1)
    return leading if is_wide else torch.linalg.qr(matrix @ leading)[0]
