"""Calibration computes where it is told to, one block at a time, and everything else stays where it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from exporter.calibration.activations import ActivationStore
from exporter.calibration.balance import find_balance
from exporter.calibration.calibrate import calibrate
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.input_statistics import InputStatistics
from exporter.calibration.inputs import CalibrationRun
from exporter.calibration.nearest import nearest_weight
from exporter.calibration.placement import Placement, choose_placement, repeatable_gradients
from exporter.errors import EnvironmentLacksError, InputError
from exporter.method_section import MethodSection
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.plan import LayerPlan, Plan
from exporter.progress import NullProgress
from exporter.recipe import CalibrationSection, load_recipe
from exporter.shards import Shard
from plugins.block_scales import BLOCK_SCALINGS
from tests.exporter.calibration.conftest import capture
from tests.exporter.pretended_gpu import GPU, OnGpu, PretendedGpu

Planner = Callable[..., Plan]
LEARNED = MethodSection(
    scale_search="absmax", iterations=2, batch_size=8, learning_rate=0.02, warmup=0.0, quantize_activations=True
)
FED_BACK = LEARNED.model_copy(update={"start": "gptq", "quantize_activations": False})
WHOLE, BY_BLOCK = Placement(GPU, memory=1 << 40), Placement(GPU, memory=1 << 10)


@pytest.fixture(autouse=True)
def _fused_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = import_module("torch.optim.optimizer")
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", GPU.type])


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize(("method", "placement"), [(FED_BACK, WHOLE), (LEARNED, BY_BLOCK)], ids=["whole", "by block"])
def test_a_calibration_on_a_gpu_is_that_on_the_cpu(
    method: MethodSection,
    placement: Placement,
    model: nn.Module,
    adapter: PixArtAdapter,
    captured: CalibrationSet,
    prompts: Prompts,
    plan_for: Planner,
) -> None:
    prefixes = ("caption_projection.linear_2", "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn2.to_k")
    plan = plan_for(*prefixes, group_size=0)
    before = _tensors(model)
    weights = torch.linspace(0.5, 1.5, len(captured))
    run = CalibrationRun(adapter, captured, prompts, weights=weights)
    here = calibrate(model, plan, run, method, 0, NullProgress())
    with PretendedGpu() as gpu:
        # Activations are on the GPU where the whole model is, too.
        store = ActivationStore(device=GPU) if placement is WHOLE else ActivationStore()
        placed = replace(run, placement=placement, limit=placement.limit(), store=store)
        there = calibrate(model, plan, placed, method, 0, NullProgress())
    assert gpu.operations > 1000
    assert all(one is other for one, other in zip(before, _tensors(model), strict=True))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    for name, weight in there.weights.items():
        assert type(weight.codes) is type(weight.scales) is torch.Tensor
        assert torch.equal(weight.scales, here.weights[name].scales)
        assert float((weight.codes != here.weights[name].codes).float().mean()) < 0.02
    for ours, theirs in zip(here.blocks, there.blocks, strict=True):
        assert theirs.error_calibrated == pytest.approx(ours.error_calibrated, rel=0.02)


@pytest.mark.parametrize("scales", ["foldable", "nvfp4"])
def test_scales_are_searched_on_a_gpu_as_on_the_cpu(scales: str) -> None:
    size = BLOCK_SCALINGS[scales].group_size if scales in BLOCK_SCALINGS else 8
    layer = LayerPlan("x", 4, 2 * size, False, "e2m1", "e2m1", size, scales, "int8")
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, layer.in_features, generator=generator) for rows in (4, 64))
    inputs = InputStatistics(x.square().mean(dim=0), float(x.abs().max()), float(x.min()), x.T @ x)
    here = nearest_weight(weight, layer, inputs, "output")
    with PretendedGpu() as gpu:
        there = nearest_weight(weight.to(GPU), layer, inputs.to(GPU), "output")
    assert gpu.operations > 100
    assert torch.equal(here.codes, there.codes)
    assert torch.equal(here.scales, there.scales)


def test_trajectories_and_the_balance_of_channels_come_back_from_a_gpu(
    model: nn.Module,
    adapter: PixArtAdapter,
    captured: CalibrationSet,
    prompts: Prompts,
    settings: CalibrationSection,
) -> None:
    folds = adapter.channel_folds(model)
    here = find_balance(CalibrationRun(adapter, captured, prompts), model, folds)
    with PretendedGpu() as gpu:
        again = capture(model, adapter, prompts, settings, BY_BLOCK)
        there = find_balance(CalibrationRun(adapter, captured, prompts, placement=WHOLE), model, folds)
    assert gpu.operations > 100
    assert type(again.hidden_states) is torch.Tensor
    torch.testing.assert_close(again.hidden_states, captured.hidden_states, rtol=1e-3, atol=1e-4)
    assert torch.equal(again.step_index, captured.step_index)
    for ours, theirs in zip(here.divisors, there.divisors, strict=True):
        assert type(theirs) is torch.Tensor
        torch.testing.assert_close(theirs, ours)


def test_one_block_at_a_time_is_on_the_gpu(model: nn.Module, adapter: PixArtAdapter) -> None:
    blocks = adapter.blocks(model)
    seen: list[list[bool]] = []
    hooks = [
        block.register_forward_pre_hook(
            lambda *_: seen.append([isinstance(next(one.parameters()), OnGpu) for _, one in blocks])
        )
        for _, block in blocks
    ]
    inputs = adapter.example_inputs(model, batch=1, tokens=6)
    with PretendedGpu(), BY_BLOCK.holds_model(model, blocks):
        adapter.forward(model, inputs.to(GPU))
        # A block that fails does not stay there.
        with pytest.raises(AttributeError):
            blocks[0][1](inputs.hidden_states.to(GPU))
        assert not isinstance(next(blocks[0][1].parameters()), OnGpu)
    for hook in hooks:
        hook.remove()
    assert seen[:2] == [[True, False], [False, True]]


def test_what_is_on_the_cpu_cannot_meet_what_is_on_the_gpu() -> None:
    with PretendedGpu(), pytest.raises(RuntimeError, match="on the CPU beside"):
        torch.ones(3).to(GPU) + torch.ones(3)


def test_devices_that_are_not_there_are_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_placement("cpu", None, Shard()) == Placement()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_placement("auto", None, Shard()) == Placement()
    with pytest.raises(EnvironmentLacksError, match=r"calibration\.device: cuda: PyTorch .* sees no GPU here"):
        choose_placement("cuda", None, Shard())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 10**9, 9 * 10**9))
    assert choose_placement("auto", None, Shard()) == Placement(torch.device("cuda", 0), 8 * 10**9)
    assert choose_placement("cuda:1", 3.0, Shard()) == Placement(torch.device("cuda", 1), 3 * 10**9)
    assert choose_placement("cuda", None, Shard(3, 4, 1)).device == torch.device("cuda", 1)
    with pytest.raises(EnvironmentLacksError, match="process 2 would have GPU 2, but the last one here is cuda:1"):
        choose_placement("auto", None, Shard(2, 4, 2))
    with pytest.raises(InputError, match="one GPU for 2 processes"):
        choose_placement("cuda:0", None, Shard(0, 2, 0))


def test_a_block_that_a_gpu_does_not_hold_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("set_per_process_memory_fraction", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=10**10))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    place = Placement(torch.device("cuda", 0), 2 * 10**9)
    with (
        pytest.raises(EnvironmentLacksError, match=r"device_memory: 2\.0 GB of cuda:0 do not suffice .*3 GiB"),
        place.computing(),
    ):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_device_that_no_recipe_can_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"calibration\.device: unknown device 'gpu'; known: auto, cpu, cuda, cuda:N"):
        load_recipe("digits", ["calibration.device=gpu"])


def test_gradients_are_repeatable_where_results_are() -> None:
    with repeatable_gradients():
        assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with repeatable_gradients():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        with (
            pytest.raises(EnvironmentLacksError, match=r"put_ does not have .*calibration\.device=cpu"),
            repeatable_gradients(),
        ):
            raise RuntimeError("put_ does not have a deterministic implementation, but you set. You can")
        with pytest.raises(RuntimeError, match="sizes"), repeatable_gradients():
            raise RuntimeError("sizes differ")
    finally:
        torch.use_deterministic_algorithms(False)


def test_activations_stay_on_a_gpu_with_room_for_them_and_a_block_that_is_learned() -> None:
    gpu = Placement(GPU, memory=1000)
    assert gpu.keeps(500, block=0)
    assert not gpu.keeps(501, block=0)
    assert gpu.keeps(200, block=50)
    assert not gpu.keeps(201, block=50)
    assert not Placement().keeps(0, block=0)
