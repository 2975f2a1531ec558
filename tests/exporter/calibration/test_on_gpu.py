"""Calibration on a real GPU gives what it gives on the CPU, and the same bits again. Skipped without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from exporter.calibration.activations import ActivationStore
from exporter.calibration.calibrate import calibrate
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.inputs import CalibrationRun
from exporter.calibration.placement import Placement, choose_placement
from exporter.calibration.transfers import Gathered, on_device
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
BF16 = METHOD.model_copy(update={"compute": "bf16"})


WHOLE, BY_BLOCK = 1 << 40, 1
"""Bytes of a GPU that a run believes to have: so few that the model's blocks come there one at a time, or plenty."""


def gpu() -> Placement:
    return choose_placement("cuda", None, Shard())


def calibrated(
    run: CalibrationRun,
    model: nn.Module,
    plan: Plan,
    method: MethodSection,
    memory: int,
    store: ActivationStore | None = None,
) -> CalibrationResult:
    placement = Placement(gpu().device, memory)
    placed = replace(run, placement=placement, limit=placement.limit(), store=store or ActivationStore())
    with gpu().computing():
        return calibrate(model, plan, placed, method, 0, NullProgress())


def tensors(result: CalibrationResult) -> list[Tensor]:
    return [tensor for weight in result.weights.values() for tensor in (weight.codes, weight.scales)]


@pytest.mark.parametrize("method", [METHOD, JOINT, BF16], ids=["default", "joint", "bf16"])
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


@pytest.mark.parametrize("method", [JOINT, BF16], ids=["joint", "bf16"])
@pytest.mark.parametrize("side", [8, 64], ids=["16 tokens", "1024 tokens"])
def test_the_same_calibration_gives_the_same_bits_again(
    method: MethodSection,
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
    first, second = (tensors(calibrated(run, model, plan, method, WHOLE)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("method", [METHOD, JOINT], ids=["default", "joint"])
def test_where_activations_are_kept_changes_no_bit(
    method: MethodSection,
    model: nn.Module,
    adapter: PixArtAdapter,
    captured: CalibrationSet,
    prompts: Prompts,
    plan_for: Callable[..., Plan],
    tmp_path: Path,
) -> None:
    plan, run = plan_for(), CalibrationRun(adapter, captured, prompts)
    stores = ActivationStore(), ActivationStore(tmp_path), ActivationStore(device=gpu().device)
    # With the whole memory Gram matrices are added up there, too, with BY_BLOCK none is.
    memories = BY_BLOCK, BY_BLOCK, WHOLE
    here, in_files, on_gpu = (
        calibrated(run, model, plan, method, memory, store) for memory, store in zip(memories, stores, strict=True)
    )
    for other in (in_files, on_gpu):
        assert all(torch.equal(*pair) for pair in zip(tensors(here), tensors(other), strict=True))
        assert [block.error_calibrated for block in other.blocks] == [block.error_calibrated for block in here.blocks]


def test_activations_come_and_go_whole() -> None:
    device = gpu().device
    values = torch.randn(300, 1 << 16, generator=torch.Generator().manual_seed(0))
    gathered = Gathered(300, ActivationStore())
    for start in range(0, 300, 70):
        part = slice(start, min(start + 70, 300))
        # A product that is still being made when its result is asked for.
        made = on_device(values, part, device)
        for _ in range(50):
            made = made * 2.0 * 0.5
        gathered.put(part, made)
    assert torch.equal(gathered.tensor, values)
    chosen = torch.tensor([7, 299, 7, 0])
    assert torch.equal(on_device(values, chosen, device).cpu(), values[chosen])


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
