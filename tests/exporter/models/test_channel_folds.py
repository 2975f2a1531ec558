"""Folded changes of inputs: the layers' inputs are what was asked for, and the network computes what it did."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from torch import Tensor, nn

from exporter.models.adapter import Adapter
from exporter.models.dit import DiTAdapter
from exporter.models.hunyuan import HunyuanAdapter
from exporter.models.pixart import PixArtAdapter
from exporter.quantize import share_copy
from tests.exporter.models.small_families import dit, hunyuan, pixart, strengthen

# What no fold reaches: it reads the residual stream, the text, or the feed-forward's activation function.
UNREACHED = {
    "pixart": ("*.attn2.to_q", "*.ff.net.2"),
    "hunyuan": ("*.attn2.to_[kv]", "*.ff.net.2", "*.norm1.linear"),
    "dit": ("*.ff.net.2", "*.norm1.*"),
}


@pytest.fixture(scope="module", params=["pixart", "hunyuan", "dit"])
def family(request: pytest.FixtureRequest) -> tuple[Adapter, nn.Module]:
    adapter, model = {
        "pixart": (PixArtAdapter(), pixart()),
        "hunyuan": (HunyuanAdapter(), hunyuan()),
        "dit": (DiTAdapter(), dit()),
    }[request.param]
    strengthen(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    return adapter, model.requires_grad_(False)


def _reached(adapter: Adapter, model: nn.Module) -> list[str]:
    return [name for fold in adapter.channel_folds(model) for names in fold.readers for name in names]


def _run(adapter: Adapter, model: nn.Module, layers: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the inputs of `layers`."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name in layers
    ]
    output = adapter.forward(model, adapter.example_inputs(model, 2, 5))
    for hook in hooks:
        hook.remove()
    return output, seen


def test_every_linear_of_the_blocks_is_reached_once_or_cannot_be(family: tuple[Adapter, nn.Module]) -> None:
    adapter, model = family
    reached = _reached(adapter, model)
    assert len(set(reached)) == len(reached)
    linears = [
        f"{block}.{name}"
        for block, module in adapter.blocks(model)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    left = [name for name in linears if name not in reached]
    assert all(any(fnmatchcase(name, pattern) for pattern in UNREACHED[adapter.family]) for name in left)
    assert len(reached) + len(left) == len(linears)


def test_inputs_change_as_asked_and_the_output_does_not(family: tuple[Adapter, nn.Module]) -> None:
    adapter, model = family
    changed, generator = share_copy(model), torch.Generator().manual_seed(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected, inputs = _run(adapter, model, _reached(adapter, model))
    wanted: dict[str, Tensor] = {}
    for fold in adapter.channel_folds(model):
        width = inputs[fold.readers[0][0]].shape[-1]
        divisor = torch.rand(width, generator=generator).double() * 3 + 0.3
        shifts = [torch.randn(width, generator=generator).double() * fold.shifts for _ in fold.readers]
        fold.apply(changed, divisor, shifts)
        for names, shift in zip(fold.readers, shifts, strict=True):
            wanted |= {name: ((inputs[name] - shift) / divisor).float() for name in names}
    output, found = _run(adapter, changed, _reached(adapter, model))
    assert float((output - expected).abs().max()) < 2e-5 * float(expected.abs().max())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_values_without_a_bias_are_not_shifted() -> None:
    model = pixart()
    model.transformer_blocks[1].attn1.to_v.bias = None
    shifts = {fold.readers[0][0]: fold.shifts for fold in PixArtAdapter().channel_folds(model)}
    assert not shifts["transformer_blocks.1.attn1.to_out.0"]
    assert shifts["transformer_blocks.0.attn1.to_out.0"]
