"""Rotations of a layer's input by a block-diagonal Hadamard matrix, after QuaRot (arXiv 2404.00456)."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


@cache
def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix over the root of `size`, a power of 4: float32 [size, size], not to be written to.

    It is orthonormal and symmetric, so it is its own inverse. The root is a power of two, so entries are exact in every
    compute type.
    """
    matrix = torch.ones(1, 1)
    for _ in range(size.bit_length() - 1):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / math.isqrt(size)


def rotate(x: Tensor, matrix: Tensor) -> Tensor:
    """x [..., K] times the block-diagonal matrix [K, K] whose blocks are all `matrix`."""
    blocks = x.reshape(*x.shape[:-1], -1, len(matrix))
    return torch.matmul(blocks, matrix).flatten(-2)
