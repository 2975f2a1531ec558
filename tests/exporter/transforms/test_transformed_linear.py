"""A transformed layer computes what the original did, with another weight where it is quantized."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from exporter.transforms.hadamard import hadamard
from exporter.transforms.linear import TransformedLinear
from exporter.transforms.low_rank import factorize


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("size", "rank"), [(16, 0), (0, 4), (16, 4)])
def test_the_output_stays(size: int, rank: int, bias: bool) -> None:
    torch.manual_seed(0)
    original = nn.Linear(32, 24, bias=bias)
    branch = factorize(original.weight.detach(), rank) if rank else None
    changed = TransformedLinear(original, size, branch)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(changed(x), original(x), rtol=1e-5, atol=1e-6)
    assert changed.linear.bias is None or torch.equal(changed.linear.bias, original.bias)
    assert not torch.allclose(changed.linear.weight, original.weight, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in changed.parameters())


def test_the_quantized_layer_reads_the_rotated_input_and_the_branch_the_input_itself() -> None:
    torch.manual_seed(0)
    original = nn.Linear(16, 8)
    changed = TransformedLinear(original, 16, factorize(original.weight.detach(), 2))
    seen = {}
    for name in ("linear", "low_rank"):
        changed.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    x = torch.randn(3, 16)
    changed(x)
    assert torch.equal(seen["low_rank"], x)
    torch.testing.assert_close(seen["linear"], x @ hadamard(16))
