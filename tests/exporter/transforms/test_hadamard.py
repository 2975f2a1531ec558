"""Rotations that every compute type holds exactly."""

from __future__ import annotations

import pytest
import torch

from exporter.layer_section import HADAMARD_SIZES
from exporter.transforms.hadamard import hadamard, rotate

SIZES = [size for size in HADAMARD_SIZES if size]


@pytest.mark.parametrize("size", SIZES)
def test_the_matrix_is_its_own_inverse_and_exact_in_bf16_and_fp16(size: int) -> None:
    matrix = hadamard(size)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix @ matrix, torch.eye(size))
    assert torch.equal(matrix.abs(), torch.full((size, size), size**-0.5))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(matrix.to(dtype).float(), matrix)


def test_a_rotation_is_the_block_diagonal_product_and_spreads_an_outlier() -> None:
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = hadamard(16).double()
    torch.testing.assert_close(rotate(x, matrix), x @ torch.block_diag(matrix, matrix))
    outlier = torch.zeros(32)
    outlier[5] = 8.0
    assert torch.equal(rotate(outlier, hadamard(16)).abs(), torch.tensor([2.0] * 16 + [0.0] * 16))
