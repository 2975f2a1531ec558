"""Outputs rounded in the torch model, and in which runs they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from exporter.output_quantizer import OutputQuantizer, quantize_outputs
from exporter.plan import LayerPlan
from exporter.transforms.linear import TransformedLinear
from plugins.fake_quantize.reference import fake_quantize
from plugins.formats import ACTIVATION_FORMATS, get_format

PLAN = LayerPlan("b.to_q.linear", 64, 32, True, "e2m1", "e2m3", 32, "foldable", "int8", output_format="e4m3")


def tokens() -> torch.Tensor:
    sizes = torch.logspace(-4, 4, 5).unsqueeze(-1)
    return torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * sizes


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("fmt", ACTIVATION_FORMATS)
def test_the_module_rounds_as_the_operator_is_defined(fmt: str, group: int) -> None:
    y, module = tokens(), OutputQuantizer(replace(PLAN, output_format=fmt, output_group=group))
    expected = torch.from_numpy(fake_quantize(y.numpy(), get_format(fmt), group))
    assert torch.equal(module(y), expected)
    values, scales = module.quantize(y)
    assert np.isin(values.numpy(), get_format(fmt).values).all()
    assert scales.shape == (3, 5, 64 // (group or 64))
    assert torch.equal(values * scales.repeat_interleave(group or 64, dim=-1), expected)


def test_a_float16_output_is_rounded_in_float32_and_stays_float16() -> None:
    y, module = tokens().half(), OutputQuantizer(PLAN)
    assert torch.equal(module(y), module(y.float()).half())


def test_gradients_pass_straight_through() -> None:
    y = tokens().requires_grad_()
    OutputQuantizer(PLAN)(y).sum().backward()
    assert y.grad is not None
    assert torch.equal(y.grad, torch.ones_like(y))


def test_what_is_rounded_is_the_sum_with_bias_and_branch() -> None:
    block = nn.ModuleDict({"to_q": TransformedLinear(nn.Linear(32, 64)), "to_k": TransformedLinear(nn.Linear(32, 64))})
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    before = {name: layer(x) for name, layer in block.items()}
    quantize_outputs(block, [PLAN, replace(PLAN, name="b.to_k", output_format="none")], root="b")
    with torch.no_grad():
        expected = fake_quantize(before["to_q"].detach().numpy(), get_format("e4m3"))
        assert np.array_equal(block["to_q"](x).numpy(), expected)
        assert torch.equal(block["to_k"](x), before["to_k"])


def test_a_layer_without_a_place_for_the_quantizer_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"b\.to_q: Linear has no place"):
        quantize_outputs(nn.ModuleDict({"to_q": nn.Linear(32, 64)}), [PLAN], root="b")
