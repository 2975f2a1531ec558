"""Rounding in torch is bitwise what the format table says in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from exporter.rounding import (
    InputQuantizer,
    dequantize,
    element_step,
    power_of_two_above,
    power_of_two_below,
    quantize_blocks,
    quantize_online,
    round_to_format,
)
from plugins.block_quantize.reference import quantize_blocks as reference_blocks
from plugins.block_scales import BLOCK_SCALINGS, tensor_scale_of
from plugins.float_dequantize.reference import dequantize_values
from plugins.float_quantize.reference import quantize_online as reference_quantize_online
from plugins.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS, FloatFormat, Format, get_format


def _bits(array: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(array, dtype=np.float32).view(np.int32)


def _hard_cases(fmt: Format) -> npt.NDArray[np.float32]:
    """Every value, every midpoint, both float32 neighbours of each, and what lies far outside."""
    grid = np.unique(fmt.values[np.isfinite(fmt.values)]).astype(np.float64)
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2]).astype(np.float32)
    lower, upper = np.nextafter(points, np.float32(-np.inf)), np.nextafter(points, np.float32(np.inf))
    extremes = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, np.inf, -np.inf], dtype=np.float32)
    return np.concatenate([points, lower, upper, extremes]).astype(np.float32)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_every_value_midpoint_and_neighbour_rounds_as_in_the_format_table(name: str) -> None:
    fmt = get_format(name)
    cases = _hard_cases(fmt)
    np.testing.assert_array_equal(_bits(round_to_format(torch.from_numpy(cases), fmt).numpy()), _bits(fmt.round(cases)))


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_random_floats_round_as_in_the_format_table(name: str) -> None:
    fmt = get_format(name)
    generator = np.random.default_rng(7)
    exponents = generator.uniform(np.log2(fmt.step) - 2, np.log2(fmt.max) + 1, 200_000)
    cases = (np.exp2(exponents) * generator.choice([-1.0, 1.0], exponents.shape)).astype(np.float32)
    np.testing.assert_array_equal(_bits(round_to_format(torch.from_numpy(cases), fmt).numpy()), _bits(fmt.round(cases)))


@pytest.mark.parametrize("bias", [2, 3])
def test_power_of_two_formats_tie_to_the_even_code_whatever_the_bias(bias: int) -> None:
    fmt = FloatFormat(f"e3m0b{bias}", 3, 0, bias_override=bias)
    cases = _hard_cases(fmt)
    np.testing.assert_array_equal(_bits(round_to_format(torch.from_numpy(cases), fmt).numpy()), _bits(fmt.round(cases)))


def test_rounding_leaves_its_input_alone() -> None:
    x = torch.tensor([0.3, -7.0, 100.0])
    for name in WEIGHT_FORMATS:
        round_to_format(x, get_format(name))
    assert x.tolist() == torch.tensor([0.3, -7.0, 100.0]).tolist()


def test_nan_stays_nan() -> None:
    for name in ("e2m1", "e1m2", "e4m3", "int8"):
        assert round_to_format(torch.tensor([float("nan")]), get_format(name)).isnan().all()


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_step_is_the_distance_to_the_next_value_of_the_table(name: str) -> None:
    fmt = get_format(name)
    grid = np.unique(np.abs(fmt.values[np.isfinite(fmt.values) & (np.abs(fmt.values) <= fmt.max)]))
    between = torch.from_numpy((grid[:-1] * 0.75 + grid[1:] * 0.25).astype(np.float32))
    distances = torch.from_numpy(grid[1:] - grid[:-1])
    assert torch.equal(element_step(between, fmt), distances)
    assert torch.equal(element_step(-between, fmt), distances)


def test_power_of_two_below_is_exact_at_every_binade_edge() -> None:
    powers = torch.tensor([2.0**exponent for exponent in range(-126, 128)])
    above = torch.nextafter(powers, torch.tensor(float("inf")))
    below = torch.nextafter(powers, torch.tensor(0.0))
    assert torch.equal(power_of_two_below(powers), powers)
    assert torch.equal(power_of_two_below(-above), powers)
    assert torch.equal(power_of_two_below(below)[1:], powers[:-1])
    assert power_of_two_below(torch.zeros(1)).item() == 0.0


@pytest.mark.parametrize("name", ACTIVATION_FORMATS)
def test_online_quantization_is_bitwise_the_reference(name: str) -> None:
    fmt = get_format(name)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 50, 96, generator=generator) * torch.logspace(-6, 4, 50)[:, None]
    x[0, 0] = 0.0
    values, scales = quantize_online(x, fmt)
    expected_values, expected_scales = reference_quantize_online(x.numpy(), fmt)
    np.testing.assert_array_equal(_bits(values.numpy()), _bits(expected_values))
    np.testing.assert_array_equal(_bits(scales.numpy()), _bits(expected_scales))


def test_a_row_of_zeros_quantizes_to_zeros_with_a_positive_scale() -> None:
    values, scales = quantize_online(torch.zeros(1, 8), get_format("e2m3"))
    assert not values.any()
    assert scales.item() > 0


def test_fake_quantization_passes_gradients_straight_through() -> None:
    x = torch.linspace(-3, 3, 32).requires_grad_()
    fmt = get_format("e2m3")
    values, scales = quantize_online(x.detach(), fmt)
    quantized = InputQuantizer(fmt).fake_quantize(x)
    quantized.square().sum().backward()
    assert torch.equal(quantized.detach(), values * scales)
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * quantized.detach())


@pytest.mark.parametrize("name", BLOCK_SCALINGS)
@pytest.mark.parametrize("share", [1.0, 0.05, 1000.0])
def test_blocks_are_bitwise_the_reference(name: str, share: float) -> None:
    scaling = BLOCK_SCALINGS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, 96, generator=generator) * torch.logspace(-12, 6, 50).unsqueeze(1)
    x[0, 0] = 0
    static = torch.tensor(tensor_scale_of(float(x.abs().max()) * share, scaling)) if scaling.has_tensor_scale else None
    before = x.clone()
    values, scales = quantize_blocks(x, scaling, static)
    wanted = reference_blocks(x.numpy(), scaling, None if static is None else np.float32(static))
    assert np.array_equal(values.numpy().view(np.int32), wanted[0].view(np.int32))
    assert np.array_equal(scales.numpy().view(np.int32), wanted[1].view(np.int32))
    assert torch.equal(x, before)
    quantizer = InputQuantizer(scaling.values, scaling, static)
    assert torch.equal(quantizer.fake_quantize(x), dequantize(values, scales))
    assert np.array_equal(dequantize(values, scales).numpy(), dequantize_values(*wanted))


def test_powers_of_two_are_found_from_below_and_above() -> None:
    x = torch.tensor([1.0, 1.5, 2.0, 2.0000002, 3.9999998, 2.0**-100])
    assert power_of_two_above(x).tolist() == [1.0, 2.0, 2.0, 4.0, 4.0, 2.0**-100]
    assert power_of_two_below(x).tolist() == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0**-100]


def test_a_missing_or_needless_static_scale_is_noticed() -> None:
    with pytest.raises(ValueError, match="nvfp4 needs a scale of the tensor"):
        quantize_blocks(torch.ones(1, 16), BLOCK_SCALINGS["nvfp4"], None)
    with pytest.raises(ValueError, match="mx has no scale of the tensor"):
        quantize_blocks(torch.ones(1, 32), BLOCK_SCALINGS["mx"], torch.tensor(1.0))
