"""A layer's error from sums over its inputs is its error on them, and learning on it is learning on all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from exporter.calibration.activations import BatchLimit
from exporter.calibration.block_inputs import BlockInputs
from exporter.calibration.layer_reconstruction import LayerError, reconstruct_layer
from exporter.calibration.nearest import nearest_weight
from exporter.calibration.reconstruction import Execution, Unit, reconstruct
from exporter.calibration.rounding_linear import RoundingLinear
from exporter.method_section import MethodSection
from exporter.plan import LayerPlan
from exporter.progress import NullProgress
from exporter.shards import Shard

SAMPLES, TOKENS, ROWS, COLUMNS = 24, 5, 32, 48
METHOD = MethodSection(iterations=120, batch_size=SAMPLES, learning_rate=0.02)


def _layer(activation: str = "none") -> RoundingLinear:
    torch.manual_seed(3)
    linear = nn.Linear(COLUMNS, ROWS).requires_grad_(False)
    plan = LayerPlan("layer", ROWS, COLUMNS, True, "e2m1", activation, 0, "channel", "int8")
    return RoundingLinear(plan, linear, nearest_weight(linear.weight, plan, None, "absmax"), activation != "none")


def _inputs(*, same: bool = False) -> tuple[BlockInputs, BlockInputs]:
    """Of the original network and of the quantized one; channels depend on each other."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, TOKENS, COLUMNS, generator=generator)
    x = x @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    weights = torch.rand(SAMPLES, generator=generator) + 0.5
    noise = 0.1 * torch.randn(x.shape, generator=generator)
    original = BlockInputs(x, {}, {}, weights=weights)
    return original, original if same else replace(original, hidden=x + noise)


def _of(layer: RoundingLinear, original: BlockInputs, quantized: BlockInputs, tokens: int = 2048) -> LayerError:
    return LayerError.of(layer, original, quantized, BatchLimit(tokens), Shard())


def _targets(layer: RoundingLinear, original: BlockInputs) -> Tensor:
    return layer.linear(original.hidden, layer.original)


@pytest.mark.parametrize("activation", ["none", "e2m3"])
@pytest.mark.parametrize("tokens", [2048, 7 * TOKENS])
def test_the_error_and_its_gradient_are_those_on_all_inputs(activation: str, tokens: int) -> None:
    layer, (original, quantized) = _layer(activation), _inputs()
    error = _of(layer, original, quantized, tokens)
    moved = (0.05 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))).double().requires_grad_()
    assert original.weights is not None
    outputs = layer.quantized_input(quantized.hidden).double() @ (layer.original.double() + moved).T
    difference = outputs - original.hidden.double() @ layer.original.double().T
    expected = (difference.square() * original.weights.view(-1, 1, 1)).sum(dim=(0, 1))
    expected.sum().backward()  # type: ignore[no-untyped-call]
    assert moved.grad is not None
    gradient = error.gradient(moved.detach())
    torch.testing.assert_close(2 * gradient, moved.grad, rtol=1e-4, atol=1e-4 * float(moved.grad.abs().max()))
    torch.testing.assert_close(error.by_channel(moved.detach(), gradient), expected.detach(), rtol=1e-4, atol=0.0)
    assert error.count == SAMPLES * TOKENS * ROWS
    power = original.square_sum(_targets(layer, original), BatchLimit())
    assert float(error.power.sum()) == pytest.approx(power, rel=1e-5)


@pytest.mark.parametrize("same", [False, True])
def test_it_learns_what_learning_on_all_samples_does(same: bool) -> None:
    original, quantized = _inputs(same=same)
    by_sums, by_samples = (Unit("layer", layer, {"layer": layer}) for layer in (_layer(), _layer()))
    with NullProgress().task("learn", 0) as task:
        ours = reconstruct_layer(by_sums, _of(by_sums.layers["layer"], original, quantized), METHOD, task)
        targets = _targets(by_samples.layers["layer"], original)
        generator = torch.Generator().manual_seed(0)
        theirs = reconstruct(by_samples, quantized, targets, METHOD, generator, Execution(), task)
    assert ours.error_start == pytest.approx(theirs.error_start, rel=1e-4)
    assert ours.error_calibrated == pytest.approx(theirs.error_calibrated, rel=1e-3)
    assert ours.error_calibrated < 0.95 * ours.error_start
    codes = [unit.layers["layer"].quantized.codes for unit in (by_sums, by_samples)]
    assert float((codes[0] != codes[1]).float().mean()) < 0.01


def test_roundings_that_are_worse_are_not_kept() -> None:
    layer, (original, quantized) = _layer(), _inputs()
    before = layer.quantized
    hopeless = METHOD.model_copy(update={"iterations": 3, "learning_rate": 50.0, "warmup": 0.0})
    with NullProgress().task("learn", 0) as task:
        unit = Unit("layer", layer, {"layer": layer})
        found = reconstruct_layer(unit, _of(layer, original, quantized), hopeless, task)
    assert found.error_calibrated == found.error_start > 0
    assert torch.equal(layer.quantized.codes, before.codes)
