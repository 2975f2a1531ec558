"""What tracing puts in the place of operations that would fix the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exporter.tracing import _RepeatedByView


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_repeats_are_views_of_the_same_numbers(dim: int) -> None:
    x = torch.arange(24).view(2, 3, 4)
    expected = x.repeat_interleave(5, dim=dim)
    with _RepeatedByView():
        found = x.repeat_interleave(5, dim=dim)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("repeats", [torch.tensor([1, 0, 2]), 2])
def test_other_repeats_stay(repeats: Tensor | int) -> None:
    x = torch.arange(3)
    with _RepeatedByView():
        assert torch.equal(x.repeat_interleave(repeats), x.repeat_interleave(repeats))
        assert x.repeat_interleave(2).tolist() == [0, 0, 1, 1, 2, 2]


def test_the_batch_stays_open_where_masks_are_repeated() -> None:
    class Masked(torch.nn.Module):
        def forward(self, mask: Tensor) -> Tensor:
            return mask.repeat_interleave(4, dim=0)

    batch = torch.export.Dim("batch", min=1, max=64)
    with _RepeatedByView():
        program = torch.export.export(Masked(), (torch.ones(2, 3),), dynamic_shapes=({0: batch},), strict=False)
    assert program.module()(torch.ones(5, 3)).shape == (20, 3)
    assert not any("repeat_interleave" in str(node.target) for node in program.graph.nodes)
