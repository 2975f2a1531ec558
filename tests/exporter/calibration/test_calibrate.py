"""Calibration: deterministic, leaves the model alone, and learned rounding beats rounding to nearest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from exporter.calibration import placement
from exporter.calibration.calibrate import calibrate
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.inputs import CalibrationRun
from exporter.method_section import MethodSection
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.passes.fold import fold_rows
from exporter.plan import Plan
from exporter.progress import NullProgress
from exporter.quantize import CalibrationResult, quantize_model
from exporter.transforms.apply import with_transforms
from plugins.block_scales import BLOCK_SCALINGS, factor_scales
from plugins.formats import get_format
from tests.exporter.progresses import Notes

# On scales that suit rounding to nearest, so few iterations of a random model cannot beat it.
RTN = MethodSection(name="rtn", scale_search="mse")
LEARNED = MethodSection(scale_search="mse", iterations=60, batch_size=8, learning_rate=0.02)

Planner = Callable[..., Plan]
Calibrator = Callable[..., CalibrationResult]


@pytest.fixture
def run(model: nn.Module, adapter: PixArtAdapter, captured: CalibrationSet, prompts: Prompts) -> Calibrator:
    def calibrated(plan: Plan, method: MethodSection, seed: int = 0) -> CalibrationResult:
        return calibrate(model, plan, CalibrationRun(adapter, captured, prompts), method, seed, NullProgress())

    return calibrated


def _noise_error(
    model: nn.Module,
    quantized: nn.Module,
    adapter: PixArtAdapter,
    captured: CalibrationSet,
    prompts: Prompts,
) -> float:
    inputs = captured.inputs(torch.arange(len(captured)), prompts)
    with torch.no_grad():
        predictions = [partial(adapter.predict_noise, network)(inputs) for network in (model, quantized)]
    return float((predictions[0] - predictions[1]).square().mean())


def _same(a: CalibrationResult, b: CalibrationResult) -> bool:
    return all(
        torch.equal(a.weights[name].codes, b.weights[name].codes)
        and torch.equal(a.weights[name].scales, b.weights[name].scales)
        for name in a.weights
    )


def test_two_runs_with_one_seed_give_the_same_bytes_and_another_seed_others(run: Calibrator, plan_for: Planner) -> None:
    plan = plan_for()
    first = run(plan, LEARNED)
    assert _same(first, run(plan, LEARNED))
    assert not _same(first, run(plan, LEARNED, seed=1))


@pytest.mark.parametrize("quantize_activations", [False, True])
def test_learned_rounding_beats_rounding_to_nearest_block_by_block_and_at_the_output(
    run: Calibrator,
    plan_for: Planner,
    model: nn.Module,
    adapter: PixArtAdapter,
    captured: CalibrationSet,
    prompts: Prompts,
    quantize_activations: bool,
) -> None:
    plan = plan_for(activation="e2m3" if quantize_activations else "none")
    nearest = run(plan, RTN)
    learned = run(plan, LEARNED.model_copy(update={"quantize_activations": quantize_activations}))
    assert nearest.blocks == ()
    assert [block.name for block in learned.blocks] == ["transformer_blocks.0", "transformer_blocks.1"]
    assert all(0 < block.error_calibrated < 0.95 * block.error_start < 0.2 for block in learned.blocks)
    errors = [
        _noise_error(model, quantize_model(model, plan, result.weights), adapter, captured, prompts)
        for result in (nearest, learned)
    ]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("quantize_activations", [False, True])
def test_learning_in_bf16_ends_as_close_as_in_fp32(
    run: Calibrator, plan_for: Planner, quantize_activations: bool
) -> None:
    plan = plan_for(activation="e2m3" if quantize_activations else "none")
    update = {"quantize_activations": quantize_activations, "start": "gptq", "learning_rate": 0.01}
    in_fp32, in_bf16, again = (
        run(plan, LEARNED.model_copy(update={**update, "compute": compute})) for compute in ("fp32", "bf16", "bf16")
    )
    assert _same(in_bf16, again)
    assert not _same(in_bf16, in_fp32)
    for one, other in zip(in_bf16.blocks, in_fp32.blocks, strict=True):
        assert one.error_calibrated == pytest.approx(other.error_calibrated, rel=0.1)
        assert one.error_calibrated < 0.98 * one.error_start
    for name, weight in in_bf16.weights.items():
        assert torch.equal(weight.scales, in_fp32.weights[name].scales)


@pytest.mark.parametrize(("emulates", "compute", "lines"), [(True, "bf16", 1), (True, "fp32", 0), (False, "bf16", 0)])
def test_bf16_that_is_emulated_is_said_to_be_slow(
    emulates: bool,
    compute: str,
    lines: int,
    model: nn.Module,
    adapter: PixArtAdapter,
    captured: CalibrationSet,
    prompts: Prompts,
    plan_for: Planner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placement, "emulates_bf16", lambda: emulates)
    method, notes = LEARNED.model_copy(update={"iterations": 1, "compute": compute}), Notes()
    calibrate(model, plan_for(), CalibrationRun(adapter, captured, prompts), method, 0, notes)
    said = "method.compute: cpu multiplies BF16 by emulation only, which is slow; fp32 is faster here"
    assert notes.lines == [said] * lines


def test_learned_codes_are_neighbours_of_the_weight_on_the_scales_of_rounding_to_nearest(
    run: Calibrator, plan_for: Planner, model: nn.Module
) -> None:
    plan, fmt = plan_for(), get_format("e2m1")
    nearest, learned = run(plan, RTN), run(plan, LEARNED)
    changed = 0
    for name, weight in learned.weights.items():
        original = model.get_submodule(name).weight
        assert torch.equal(weight.scales, nearest.weights[name].scales)
        expanded = weight.scales.repeat_interleave(original.shape[1] // weight.scales.shape[1], dim=1)
        # 2 is the widest gap between neighbours of E2M1.
        inside = original.abs() <= fmt.max * expanded
        assert bool(((weight.dequantize(fmt) - original).abs() <= 2.0 * expanded)[inside].all())
        changed += int((weight.codes != nearest.weights[name].codes).sum())
    assert changed > 100


def test_the_original_model_stays_as_it_was(run: Calibrator, plan_for: Planner, model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    run(plan_for(), LEARNED)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_before_and_after_the_blocks_are_learned_on_their_own(run: Calibrator, plan_for: Planner) -> None:
    plan = plan_for("caption_projection", "transformer_blocks.1", "proj_out", group_size=0)
    names = [block.name for block in run(plan, LEARNED).blocks]
    assert names == ["caption_projection.linear_1", "caption_projection.linear_2", "transformer_blocks.1", "proj_out"]


def test_rounding_to_nearest_stays_where_learning_does_worse(run: Calibrator, plan_for: Planner) -> None:
    plan = plan_for("transformer_blocks.0")
    hopeless = LEARNED.model_copy(update={"iterations": 3, "learning_rate": 50.0, "warmup": 0.0})
    result = run(plan, hopeless)
    assert result.blocks[0].error_calibrated == result.blocks[0].error_start > 0
    assert _same(result, run(plan, RTN))


def test_searched_scales_help_at_the_output(
    run: Calibrator,
    plan_for: Planner,
    model: nn.Module,
    adapter: PixArtAdapter,
    captured: CalibrationSet,
    prompts: Prompts,
) -> None:
    plan = plan_for(activation="none", group_size=0)
    errors = [
        _noise_error(
            model,
            quantize_model(model, plan, run(plan, RTN.model_copy(update={"scale_search": search})).weights),
            adapter,
            captured,
            prompts,
        )
        for search in ("absmax", "mse")
    ]
    assert errors[1] < errors[0]


def test_searching_by_output_keeps_scales_foldable_and_changes_them(run: Calibrator, plan_for: Planner) -> None:
    plan = plan_for()
    by_weight, by_output = (
        run(plan, RTN.model_copy(update={"scale_search": search})).weights for search in ("mse", "output")
    )
    for layer in plan.layers:
        scales = by_output[layer.name].scales
        assert not torch.equal(scales, by_weight[layer.name].scales)
        if layer.scales == "foldable":
            assert fold_rows(scales.numpy(), layer.multipliers) is not None


def test_a_block_that_rounds_without_error_is_left_alone(
    model: nn.Module, adapter: PixArtAdapter, captured: CalibrationSet, prompts: Prompts, plan_for: Planner
) -> None:
    plan = plan_for("transformer_blocks.0", group_size=0, activation="none")
    exact = copy.deepcopy(model)
    values = torch.from_numpy(get_format("e2m1").values.copy())
    for layer in plan.layers:
        weight: Tensor = exact.get_submodule(layer.name).weight
        codes = torch.randint(0, 16, weight.shape, generator=torch.Generator().manual_seed(1))
        codes[:, 0] = 7  # every row holds the largest value, so its scale is 1/16
        with torch.no_grad():
            weight.copy_(values[codes] / 16)
    method = LEARNED.model_copy(update={"scale_search": "absmax"})
    plan = replace(plan, layers=tuple(replace(layer, scales="channel") for layer in plan.layers))
    result = calibrate(exact, plan, CalibrationRun(adapter, captured, prompts), method, 0, NullProgress())
    assert result.blocks[0].error_start == result.blocks[0].error_calibrated == 0.0


@pytest.mark.parametrize(("scales", "fmt"), [("nvfp4", "e2m1"), ("mx", "e4m3")])
@pytest.mark.parametrize("method", [RTN, LEARNED.model_copy(update={"iterations": 5, "quantize_activations": True})])
def test_blocks_are_calibrated_on_scales_that_ship(
    run: Calibrator, plan_for: Planner, model: nn.Module, method: MethodSection, scales: str, fmt: str
) -> None:
    scaling = BLOCK_SCALINGS[scales]
    plan = plan_for("transformer_blocks.0.attn1", group_size=scaling.group_size, activation=fmt)
    plan = replace(plan, layers=tuple(replace(layer, weight_format=fmt, scales=scales) for layer in plan.layers))
    result = run(plan, method)
    static = {float(w.input_scale) for w in result.weights.values() if w.input_scale is not None}
    for name, weight in result.weights.items():
        assert factor_scales(weight.scales.numpy(), scaling) is not None
        assert (weight.input_scale is not None) == scaling.has_tensor_scale
        original = model.get_submodule(name).weight
        assert float((weight.dequantize(get_format(fmt)) - original).abs().max()) < 0.3 * float(original.abs().max())
    # q, k and v read the same tensor, to_out another one.
    assert len(static) == (2 if scaling.has_tensor_scale else 0)


def test_rounding_is_learned_on_quantized_outputs_where_activations_are_quantized_meanwhile(
    model: nn.Module, adapter: PixArtAdapter, captured: CalibrationSet, prompts: Prompts, plan_for: Planner
) -> None:
    plan = plan_for("transformer_blocks.0.attn1.to_", activation="e4m3")
    names = {layer.name: replace(layer, name=f"{layer.name}.linear") for layer in plan.layers}
    rounded = [replace(layer, output_format="e2m1", output_group=16) for layer in names.values()]
    changed, calibration = with_transforms(model, rounded, {}), CalibrationRun(adapter, captured, prompts)
    found = {}
    for quantizes in (False, True):
        method = LEARNED.model_copy(update={"iterations": 2, "quantize_activations": quantizes})
        for layers in (tuple(names.values()), tuple(rounded)):
            results = replace(plan, layers=layers)
            found[quantizes, layers[0].output_format] = calibrate(
                changed, results, calibration, method, 0, NullProgress()
            )
    assert _same(found[False, "none"], found[False, "e2m1"])
    # What the block's output loses to its quantized outputs is part of its error, or is not.
    errors = {key: result.blocks[0].error_start for key, result in found.items()}
    assert errors[False, "e2m1"] == errors[False, "none"]
    assert errors[True, "e2m1"] > 1.2 * errors[True, "none"]


def test_error_feedback_beats_rounding_to_nearest_by_layer_and_in_the_end(
    run: Calibrator,
    plan_for: Planner,
    model: nn.Module,
    adapter: PixArtAdapter,
    captured: CalibrationSet,
    prompts: Prompts,
) -> None:
    plan = plan_for("transformer_blocks", activation="none")
    nearest, fed_back = run(plan, RTN), run(plan, MethodSection(name="gptq", scale_search="mse"))
    assert [block.name for block in fed_back.blocks] == [layer.name for layer in plan.layers]
    assert all(block.error_calibrated <= block.error_start for block in fed_back.blocks)
    errors = [
        _noise_error(model, quantize_model(model, plan, result.weights), adapter, captured, prompts)
        for result in (nearest, fed_back)
    ]
    assert errors[1] < 0.7 * errors[0]
    assert _same(fed_back, run(plan, MethodSection(name="gptq", scale_search="mse")))


def test_learning_goes_on_from_error_feedback(run: Calibrator, plan_for: Planner) -> None:
    """It begins with the decisions of error feedback, and learns from there."""
    plan, method = plan_for("transformer_blocks.1", activation="none"), LEARNED.model_copy(update={"start": "gptq"})
    fed_back = run(plan, MethodSection(name="gptq", scale_search="mse"))
    assert _same(fed_back, run(plan, method.model_copy(update={"iterations": 1, "learning_rate": 1e-9})))
    (learned,) = run(plan, method.model_copy(update={"learning_rate": 0.005})).blocks
    (nearest,) = run(plan, LEARNED).blocks
    assert learned.error_calibrated < learned.error_start < 0.9 * nearest.error_start
