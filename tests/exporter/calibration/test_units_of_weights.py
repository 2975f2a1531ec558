"""What unit weights are measured in changes no code: learning is relative to them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from exporter.calibration.calibrate import calibrate
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.inputs import CalibrationRun
from exporter.method_section import MethodSection
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.plan import Plan
from exporter.progress import NullProgress

LEARNED = MethodSection(scale_search="mse", iterations=60, batch_size=8, learning_rate=0.02)

Planner = Callable[..., Plan]


@pytest.mark.parametrize(
    "method",
    [
        # Scales that clip some rows and not others, and scales that clip none.
        LEARNED,
        LEARNED.model_copy(update={"scale_search": "absmax"}),
        LEARNED.model_copy(update={"start": "gptq", "learning_rate": 0.01}),
    ],
    ids=["clipped", "exact", "error feedback"],
)
def test_a_layer_in_another_unit_gets_the_same_codes(
    model: nn.Module,
    adapter: PixArtAdapter,
    captured: CalibrationSet,
    prompts: Prompts,
    plan_for: Planner,
    method: MethodSection,
) -> None:
    """proj_out is linear in its weight and nothing follows it, so only the unit of its output changes. Factors that are
    no powers of two change how every sum is rounded, and learning must not follow that."""
    plan = plan_for("proj_out", group_size=0, activation="none")
    run = CalibrationRun(adapter, captured, prompts)
    codes = []
    for factor in (1.0, 1000.0, 0.001):
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            scaled.proj_out.weight.mul_(factor)
            scaled.proj_out.bias.mul_(factor)
        codes.append(calibrate(scaled, plan, run, method, 0, NullProgress()).weights["proj_out"].codes)
    assert torch.equal(codes[1], codes[0])
    assert torch.equal(codes[2], codes[0])


@pytest.mark.parametrize("scales", ["group", "foldable"])
def test_a_block_whose_layers_trade_units_gets_the_same_codes(
    model: nn.Module,
    adapter: PixArtAdapter,
    captured: CalibrationSet,
    prompts: Prompts,
    plan_for: Planner,
    scales: str,
) -> None:
    """Values of attention times a factor and its output layer over it: the same block, learned jointly. A factor that
    is no power of two changes how sums are rounded, and with them the odd tie."""
    plan = plan_for("transformer_blocks.0", scales=scales)
    run = CalibrationRun(adapter, captured, prompts)
    found = []
    for factor in (1.0, 1024.0, 0.001):
        scaled = copy.deepcopy(model)
        attention = scaled.get_submodule("transformer_blocks.0.attn1")
        with torch.no_grad():
            attention.to_v.weight.mul_(factor)
            attention.to_v.bias.mul_(factor)
            attention.to_out[0].weight.div_(factor)
        method = LEARNED.model_copy(update={"scale_search": "output"})
        weights = calibrate(scaled, plan, run, method, 0, NullProgress()).weights
        found.append({name: weight.codes for name, weight in weights.items()})
    for other, most in zip(found[1:], (0, 0.002), strict=True):
        for name, codes in found[0].items():
            assert float((codes != other[name]).float().mean()) <= most
