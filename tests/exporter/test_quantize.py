"""Quantized layers compute what the operators' references say, share the original's memory, and survive their file."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exporter.calibration.block_scales import choose_block_scales, static_scale
from exporter.calibration.scales import choose_scales
from exporter.errors import InputError
from exporter.plan import LayerPlan, Plan
from exporter.quantize import (
    BlockStatistics,
    CalibrationResult,
    QuantizedWeight,
    QuantLinear,
    load_quantized,
    quantize_model,
    round_to_nearest,
    save_quantized,
)
from plugins.block_quantize.reference import quantize_blocks
from plugins.block_scales import BLOCK_SCALINGS
from plugins.float_dequantize.reference import dequantize_codes, dequantize_values
from plugins.float_quantize.reference import quantize_online
from plugins.formats import WEIGHT_FORMATS, get_format

PLANS = (
    LayerPlan("0", 24, 64, True, "e2m1", "e2m3", 16, "foldable", "int8"),
    LayerPlan("2", 16, 24, False, "e2m3", "none", 0, "channel", "int8"),
)
PLAN = Plan(layers=PLANS, high_precision=(), fp32_bytes=0, expected_bytes=0)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 24), nn.GELU(), nn.Linear(24, 16, bias=False), nn.Linear(16, 4))


def _quantized(model: nn.Module) -> CalibrationResult:
    weights = {}
    for layer in PLANS:
        weight, fmt = model.get_submodule(layer.name).weight.detach(), get_format(layer.weight_format)
        allowed = layer.multipliers if layer.scales == "foldable" else ()
        scales = choose_scales(weight, fmt, layer.group_size, "mse", None, allowed)
        weights[layer.name] = round_to_nearest(weight, scales, fmt)
    return CalibrationResult(weights, (BlockStatistics("block", 0.5, 0.25, 3.0),))


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_dequantized_weights_are_bitwise_the_reference(name: str) -> None:
    fmt = get_format(name)
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    scales = choose_scales(weight, fmt, 16, "absmax")
    quantized = round_to_nearest(weight, scales, fmt)
    expected = dequantize_codes(quantized.codes.numpy(), scales.numpy(), fmt, 16)
    np.testing.assert_array_equal(quantized.dequantize(fmt).numpy(), expected)
    assert quantized.codes.dtype == torch.uint8


def test_rounding_to_nearest_gives_positive_zeros() -> None:
    quantized = round_to_nearest(torch.tensor([[-1e-6, 1.0, -0.0, 0.0]]), torch.ones(1, 1), get_format("e2m1"))
    assert quantized.codes.tolist() == [[0, 2, 0, 0]]


def test_a_quantized_linear_multiplies_the_reference_operands(model: nn.Module) -> None:
    result = _quantized(model)
    quantized = quantize_model(model, PLAN, result.weights)
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(2))
    first = quantized.get_submodule("0")
    assert isinstance(first, QuantLinear)
    values, scales = quantize_online(x.numpy(), get_format("e2m3"))
    weight = dequantize_codes(
        result.weights["0"].codes.numpy(), result.weights["0"].scales.numpy(), get_format("e2m1"), 16
    )
    expected = (values.astype(np.float64) * scales) @ weight.astype(np.float64).T + first.bias.numpy()
    np.testing.assert_allclose(first(x).numpy(), expected, rtol=1e-4, atol=1e-5)
    second = quantized.get_submodule("2")
    assert isinstance(second, QuantLinear)
    assert second.quantize_input(x) is None
    assert second.bias is None


def test_only_planned_layers_change_and_the_rest_shares_memory(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    quantized = quantize_model(model, PLAN, _quantized(model).weights)
    assert [type(module) for module in quantized] == [QuantLinear, nn.GELU, QuantLinear, nn.Linear]
    assert [type(module) for module in model] == [nn.Linear, nn.GELU, nn.Linear, nn.Linear]
    assert quantized[3].weight.data_ptr() == model[3].weight.data_ptr()
    assert quantized[0].bias.data_ptr() == model[0].bias.data_ptr()
    assert not quantized[3].weight.requires_grad
    assert model[3].weight.requires_grad
    assert not quantized.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert set(quantized.state_dict()) == {
        "0.words", "0.scales", "0.bias", "2.words", "2.scales", "3.weight", "3.bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "1"}, "1: the model has no linear layer"),
        ({"name": "9"}, "9: the model has no linear layer"),
        ({"in_features": 32}, "0: the model's layer is"),
        ({"has_bias": False}, "0: the model's layer is"),
    ],
)
def test_a_plan_for_another_model_is_refused(model: nn.Module, change: dict[str, object], message: str) -> None:
    plan = replace(PLAN, layers=(replace(PLANS[0], **change),))
    with pytest.raises(ValueError, match=message):
        quantize_model(model, plan, _quantized(model).weights)


def test_missing_or_wrong_weights_are_refused(model: nn.Module) -> None:
    weights = dict(_quantized(model).weights)
    with pytest.raises(ValueError, match=r"2: no quantized weight of shape \[16, 24\]"):
        quantize_model(model, PLAN, {"0": weights["0"]})
    with pytest.raises(ValueError, match=r"2: no quantized weight of shape \[16, 24\]"):
        quantize_model(model, PLAN, {"0": weights["0"], "2": weights["0"]})


def test_a_saved_result_comes_back_and_has_the_same_bytes_each_time(model: nn.Module, tmp_path: Path) -> None:
    result = _quantized(model)
    save_quantized(tmp_path / "a.safetensors", result, PLAN)
    save_quantized(
        tmp_path / "b.safetensors", replace(result, blocks=(BlockStatistics("block", 0.5, 0.25, 9.0),)), PLAN
    )
    loaded = load_quantized(tmp_path / "a.safetensors", PLAN)
    for name, weight in result.weights.items():
        assert torch.equal(loaded.weights[name].codes, weight.codes)
        assert torch.equal(loaded.weights[name].scales, weight.scales)
    assert loaded.blocks == (BlockStatistics("block", 0.5, 0.25, 0.0),)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_codes_are_stored_packed(model: nn.Module, tmp_path: Path) -> None:
    save_quantized(tmp_path / "q.safetensors", _quantized(model), PLAN)
    shapes = {name: list(tensor.shape) for name, tensor in load_file(tmp_path / "q.safetensors").items()}
    assert shapes == {"0.words": [24, 8], "0.scales": [24, 4], "2.words": [16, 5], "2.scales": [16, 1]}


def test_the_target_may_change_but_not_what_the_codes_depend_on(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    save_quantized(path, _quantized(model), PLAN)
    assert load_quantized(path, replace(PLAN, layers=(replace(PLANS[0], activation_format="e4m3"), PLANS[1]))).weights
    for layers, named in (
        ((replace(PLANS[0], weight_format="e1m2"), PLANS[1]), "0: made for"),
        ((replace(PLANS[0], group_size=32), PLANS[1]), "0: made for"),
        ((replace(PLANS[0], container="fp8"), PLANS[1]), "0: made for"),
        (PLANS[:1], "2: made for"),
    ):
        with pytest.raises(InputError, match=named):
            load_quantized(path, replace(PLAN, layers=layers))


def _rewrite(path: Path, name: str, tensor: Tensor | None) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("0.scales", None, "tensors missing or unexpected: 0.scales"),
        ("0.extra", torch.ones(1), "tensors missing or unexpected: 0.extra"),
        ("0.scales", torch.ones(24, 3), r"0.scales: torch.float32 \[24, 3\]"),
        ("0.scales", torch.ones(24, 4, dtype=torch.float64), "0.scales: torch.float64"),
        ("0.scales", torch.zeros(24, 4), "0.scales: must be finite and positive"),
        ("0.scales", torch.full((24, 4), float("inf")), "0.scales: must be finite and positive"),
        ("0.words", torch.zeros(24, 7, dtype=torch.int32), "0.words: "),
        ("0.words", torch.zeros(23, 8, dtype=torch.int32), "0.words: not 24 rows"),
        ("0.words", torch.zeros(24, 8, dtype=torch.int64), "0.words: "),
    ],
)
def test_damaged_files_are_refused_by_tensor_name(
    model: nn.Module, tmp_path: Path, name: str, tensor: Tensor | None, message: str
) -> None:
    path = tmp_path / "q.safetensors"
    save_quantized(path, _quantized(model), PLAN)
    _rewrite(path, name, tensor)
    with pytest.raises(InputError, match=message):
        load_quantized(path, PLAN)


def test_codes_that_the_format_never_gives_are_refused(tmp_path: Path) -> None:
    layer = replace(PLANS[1], weight_format="int8")
    plan = replace(PLAN, layers=(layer,))
    codes = torch.full((16, 24), 128, dtype=torch.uint8)  # -128 in two's complement
    save_quantized(tmp_path / "q", CalibrationResult({"2": QuantizedWeight(codes, torch.ones(16, 1))}), plan)
    with pytest.raises(InputError, match=r"2\.words: not 16 rows of int8 codes"):
        load_quantized(tmp_path / "q", plan)


@pytest.mark.parametrize("metadata", [None, {"fp4export.quantized": "{"}, {"fp4export.quantized": json.dumps({})}])
def test_other_safetensors_files_are_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(InputError, match="quantized weights"):
        load_quantized(tmp_path / "x.safetensors", PLAN)


def test_truncated_and_missing_files_are_refused(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    save_quantized(path, _quantized(model), PLAN)
    path.write_bytes(path.read_bytes()[:-1])
    for broken in (path, tmp_path / "absent.safetensors"):
        with pytest.raises(InputError, match="cannot be read as quantized weights"):
            load_quantized(broken, PLAN)


BLOCK_LAYER = LayerPlan("0", 24, 64, True, "e2m1", "e2m1", 16, "nvfp4", "fp4")
BLOCK_PLAN = Plan(layers=(BLOCK_LAYER,), high_precision=(), fp32_bytes=0, expected_bytes=0)


def _in_blocks(model: nn.Module) -> CalibrationResult:
    weight = model.get_submodule("0").weight.detach()
    scales = choose_block_scales(weight, BLOCK_SCALINGS["nvfp4"], "mse")
    static = static_scale(3.0, BLOCK_SCALINGS["nvfp4"])
    return CalibrationResult({"0": round_to_nearest(weight, scales, get_format("e2m1"), static)})


def test_a_linear_in_blocks_multiplies_the_reference_operands(model: nn.Module) -> None:
    result = _in_blocks(model)
    linear = quantize_model(model, BLOCK_PLAN, result.weights).get_submodule("0")
    assert isinstance(linear, QuantLinear)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    static = result.weights["0"].input_scale
    assert static is not None
    values, scales = quantize_blocks(x.numpy(), BLOCK_SCALINGS["nvfp4"], np.float32(static))
    x_hat = torch.from_numpy(dequantize_values(values, scales))
    assert torch.equal(linear(x), nn.functional.linear(x_hat, linear.weight, linear.bias))


def test_the_static_scale_of_an_input_is_saved_and_needed(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    result = _in_blocks(model)
    save_quantized(path, result, BLOCK_PLAN)
    loaded = load_quantized(path, BLOCK_PLAN).weights["0"]
    saved = result.weights["0"]
    assert loaded.input_scale is not None
    assert saved.input_scale is not None
    assert torch.equal(loaded.input_scale, saved.input_scale)
    assert torch.equal(loaded.codes, saved.codes)
    for wrong, message in (
        (None, "tensors missing or unexpected: 0.input_scale"),
        (torch.tensor(0.0), "0.input_scale: must be one finite and positive number"),
        (torch.ones(1), "0.input_scale: must be one"),
        (torch.tensor(float("nan")), "0.input_scale: must be one"),
    ):
        save_quantized(path, result, BLOCK_PLAN)
        _rewrite(path, "0.input_scale", wrong)
        with pytest.raises(InputError, match=message):
            load_quantized(path, BLOCK_PLAN)
