"""Balanced channels: the same network, whose quantized inputs lose less."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from exporter.calibration.balance import Balance, find_balance
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.inputs import CalibrationRun
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.rounding import InputQuantizer
from plugins.formats import get_format

LAYER = "transformer_blocks.1.ff.net.0.proj"


@pytest.fixture(scope="module")
def uneven(model: nn.Module) -> nn.Module:
    """The model with a feed-forward input that has a large channel and one far from zero."""
    uneven = copy.deepcopy(model)
    with torch.no_grad():
        for block in uneven.transformer_blocks:
            block.scale_shift_table[4, 3] += 15.0
            block.scale_shift_table[3, 7] += 10.0
    return uneven


@pytest.fixture(scope="module")
def run(adapter: PixArtAdapter, captured: CalibrationSet, prompts: Prompts) -> CalibrationRun:
    return CalibrationRun(adapter, captured, prompts)


@pytest.fixture(scope="module")
def balance(run: CalibrationRun, uneven: nn.Module) -> Balance:
    return find_balance(run, uneven, run.adapter.channel_folds(uneven))


def _relative_error(run: CalibrationRun, model: nn.Module) -> float:
    """What quantizing the layer's input to E2M3 does to its output."""
    x, layer = run.layer_inputs(model, LAYER), model.get_submodule(LAYER)
    exact = layer(x)
    rounded = layer(InputQuantizer(get_format("e2m3")).fake_quantize(x))
    return float((rounded - exact).square().sum() / (exact - exact.mean(dim=(0, 1))).square().sum())


def test_quantized_inputs_lose_far_less(run: CalibrationRun, uneven: nn.Module, balance: Balance) -> None:
    balanced = balance.applied(uneven, run.adapter.channel_folds(uneven))
    assert _relative_error(run, balanced) < 0.3 * _relative_error(run, uneven)


def test_channels_are_centred_and_half_of_their_spread_is_taken(
    run: CalibrationRun, uneven: nn.Module, balance: Balance
) -> None:
    """The divisors are shared by both blocks: the geometric mean of the spreads comes to its root."""
    balanced = balance.applied(uneven, run.adapter.channel_folds(uneven))
    logs = []
    for network in (uneven, balanced):
        inputs = [run.layer_inputs(network, LAYER.replace("1", block)).flatten(0, -2) for block in "01"]
        spread = torch.stack([x.std(dim=0).log() for x in inputs]).mean(dim=0)
        logs.append(spread - spread.mean())
    torch.testing.assert_close(logs[1], logs[0] / 2, rtol=1e-3, atol=1e-3)
    assert float(run.layer_inputs(balanced, LAYER).flatten(0, -2).mean(dim=0).abs().max()) < 1e-4


def test_without_biases_nothing_is_shifted(adapter: PixArtAdapter, run: CalibrationRun, uneven: nn.Module) -> None:
    bare = copy.deepcopy(uneven)
    bare.get_submodule(LAYER).bias = None
    folds = adapter.channel_folds(bare)
    found = find_balance(run, bare, folds)
    at = next(index for index, fold in enumerate(folds) if LAYER in sum(fold.readers, ()))
    assert not any(bool(shift.any()) for shift in found.shifts[at])
    assert bool(found.shifts[0][0].any())


def test_channels_that_never_move_stay_finite(run: CalibrationRun, uneven: nn.Module) -> None:
    dead = copy.deepcopy(uneven)
    with torch.no_grad():
        for block in dead.transformer_blocks:
            block.attn1.to_v.weight[:8] = 0.0
    folds = run.adapter.channel_folds(dead)
    divisors = find_balance(run, dead, folds).divisors
    assert all(bool((divisor > 0).all()) and bool(divisor.isfinite().all()) for divisor in divisors)


def test_it_is_read_back_as_it_was_written(
    run: CalibrationRun, uneven: nn.Module, balance: Balance, tmp_path: Path
) -> None:
    balance.save(tmp_path / "balance.safetensors")
    again = Balance.load(tmp_path / "balance.safetensors", run.adapter.channel_folds(uneven))
    assert all(torch.equal(one, other) for one, other in zip(balance.divisors, again.divisors, strict=True))
    pairs = zip(balance.shifts, again.shifts, strict=True)
    assert all(torch.equal(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


def test_powers_of_two_leave_the_weights_in_front_their_bits(run: CalibrationRun, uneven: nn.Module) -> None:
    folds = run.adapter.channel_folds(uneven)
    stored = copy.deepcopy(uneven).half().float()
    free, exact = (find_balance(run, stored, folds, powers_of_two=powers) for powers in (False, True))
    for divisor, nearby in zip(exact.divisors, free.divisors, strict=True):
        assert torch.equal(divisor, divisor.log2().round().exp2())
        assert float(divisor.max()) == 1
        factor = (nearby / divisor).log2()
        assert float(factor.max() - factor.min()) <= 1 + 1e-6
    name = "adaln_single.linear.weight"
    kept = {
        powers: balance.applied(stored, folds).get_parameter(name) for powers, balance in ((False, free), (True, exact))
    }
    assert not torch.equal(kept[False], kept[False].half().float())
    assert torch.equal(kept[True], kept[True].half().float())
    assert not torch.equal(kept[True], stored.get_parameter(name))
    assert _relative_error(run, exact.applied(stored, folds)) < 0.4 * _relative_error(run, stored)
