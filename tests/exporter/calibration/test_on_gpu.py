"""Calibration on a real GPU gives what it gives on the CPU, and the same bits again. Skipped without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from exporter.calibration.calibrate import calibrate
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.inputs import CalibrationRun
from exporter.calibration.placement import Placement, choose_placement
from exporter.method_section import MethodSection
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.plan import Plan
from exporter.progress import NullProgress
from exporter.quantize import CalibrationResult
from exporter.recipe import CalibrationSection
from exporter.shards import Shard
from tests.exporter.calibration.conftest import capture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and there is none"),
]

METHOD = MethodSection(effort="default", iterations=20, batch_size=8)
JOINT = METHOD.model_copy(update={"quantize_activations": True, "scale_search": "absmax"})


WHOLE, BY_BLOCK = 1 << 40, 1
"""Bytes of a GPU that a run believes to have: so few that the model's blocks come there one at a time, or plenty."""


def gpu() -> Placement:
    return choose_placement("cuda", None, Shard())


def calibrated(
    run: CalibrationRun, model: nn.Module, plan: Plan, method: MethodSection, memory: int
) -> CalibrationResult:
    placement = Placement(gpu().device, memory)
    placed = replace(run, placement=placement, limit=placement.limit())
    with gpu().computing():
        return calibrate(model, plan, placed, method, 0, NullProgress())


def tensors(result: CalibrationResult) -> list[Tensor]:
    return [tensor for weight in result.weights.values() for tensor in (weight.codes, weight.scales)]


@pytest.mark.parametrize("method", [METHOD, JOINT], ids=["default", "joint"])
@pytest.mark.parametrize("memory", [WHOLE, BY_BLOCK], ids=["whole", "by block"])
def test_a_calibration_on_the_gpu_is_that_on_the_cpu(
    method: MethodSection,
    memory: int,
    model: nn.Module,
    adapter: PixArtAdapter,
    captured: CalibrationSet,
    prompts: Prompts,
    plan_for: Callable[..., Plan],
) -> None:
    plan, run = plan_for(), CalibrationRun(adapter, captured, prompts)
    here = calibrate(model, plan, run, method, 0, NullProgress())
    there = calibrated(run, model, plan, method, memory)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    for name, weight in there.weights.items():
        assert weight.codes.device.type == weight.scales.device.type == "cpu"
        assert float((weight.codes != here.weights[name].codes).float().mean()) < 0.05
    for ours, theirs in zip(here.blocks, there.blocks, strict=True):
        assert theirs.error_calibrated == pytest.approx(ours.error_calibrated, rel=0.05)


@pytest.mark.parametrize("side", [8, 64], ids=["16 tokens", "1024 tokens"])
def test_the_same_calibration_gives_the_same_bits_again(
    side: int,
    model: nn.Module,
    adapter: PixArtAdapter,
    captured: CalibrationSet,
    prompts: Prompts,
    plan_for: Callable[..., Plan],
) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(captured), 2, side, side, generator=generator)
    plan, run = plan_for(), CalibrationRun(adapter, replace(captured, hidden_states=latents), prompts)
    first, second = (tensors(calibrated(run, model, plan, JOINT, WHOLE)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_captured_trajectories_are_those_of_the_cpu(
    model: nn.Module, adapter: PixArtAdapter, prompts: Prompts, settings: CalibrationSection, captured: CalibrationSet
) -> None:
    placement = gpu()
    with placement.computing():
        found = capture(model, adapter, prompts, settings, placement)
    assert torch.equal(found.timesteps, captured.timesteps)
    assert torch.allclose(found.hidden_states, captured.hidden_states, rtol=1e-3, atol=1e-3)


def test_batches_shrink_until_they_fit_the_gpu() -> None:
    placement = Placement(gpu().device, 5 << 29)
    limit, sizes = placement.limit(), []

    def work(part: slice) -> None:
        # A GiB a sample: two at most in 2.5.
        torch.empty(part.stop - part.start, 1 << 28, device=placement.device)
        sizes.append(part.stop - part.start)

    with placement.computing():
        limit.each(8, 1 << 10, work)
    assert sum(sizes) == 8
    assert max(sizes) <= 2
