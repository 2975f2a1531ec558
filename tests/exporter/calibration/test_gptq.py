"""Error feedback: on the grid, nothing but rounding where inputs are independent, far better where they are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exporter.calibration.gptq import ErrorFeedback, round_with_feedback
from exporter.calibration.scales import choose_scales
from exporter.plan import LayerPlan
from exporter.quantize import QuantizedWeight, expand_scales, round_to_nearest
from plugins.containers import INT8, multipliers
from plugins.formats import WEIGHT_FORMATS, Format, get_format

ROWS, COUNT, GROUP = 16, 160, 32


def _weight(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, COUNT, generator=torch.Generator().manual_seed(seed)) * 0.03


def _inputs(seed: int, tokens: int = 500) -> Tensor:
    """Tokens whose channels share eight directions; those are the same whatever the seed."""
    mix = torch.randn(8, COUNT, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 8, generator=generator) @ mix + 0.1 * torch.randn(tokens, COUNT, generator=generator)


def _error(weight: Tensor, values: Tensor, scales: Tensor, x: Tensor) -> float:
    rounding = values * expand_scales(scales, COUNT) - weight
    return float((x.double() @ rounding.double().T).square().sum())


def _nearest(weight: Tensor, scales: Tensor, fmt: Format) -> Tensor:
    return torch.tensor(fmt.values)[round_to_nearest(weight, scales, fmt).codes.int()]


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_every_value_is_one_of_the_format(name: str) -> None:
    fmt, weight = get_format(name), _weight()
    scales = choose_scales(weight, fmt, GROUP, "absmax")
    values = ErrorFeedback.of(_inputs(1).T @ _inputs(1)).round(weight, scales, fmt)
    assert torch.equal(torch.from_numpy(fmt.round(values.numpy())), values)
    assert not bool((values[values == 0].signbit()).any())
    shipped = QuantizedWeight.from_values(values, scales, fmt).dequantize(fmt)
    assert torch.equal(shipped, values * expand_scales(scales, COUNT))


@pytest.mark.parametrize("name", ["e2m1", "e1m2", "e3m0", "int4"])
def test_output_error_falls_on_other_inputs_too(name: str) -> None:
    fmt, weight, seen, fresh = get_format(name), _weight(), _inputs(1), _inputs(2)
    allowed = multipliers(fmt, INT8)
    scales = choose_scales(weight, fmt, GROUP, "mse", None, allowed if len(allowed) > 1 else ())
    values, nearest = ErrorFeedback.of(seen.T @ seen).round(weight, scales, fmt), _nearest(weight, scales, fmt)
    assert _error(weight, values, scales, seen) < 0.2 * _error(weight, nearest, scales, seen)
    assert _error(weight, values, scales, fresh) < 0.25 * _error(weight, nearest, scales, fresh)


def test_independent_inputs_leave_rounding_to_nearest() -> None:
    fmt, weight = get_format("e2m1"), _weight()
    scales = choose_scales(weight, fmt, GROUP, "absmax")
    gram = torch.diag(torch.rand(COUNT, generator=torch.Generator().manual_seed(3)) + 0.1)
    assert torch.equal(ErrorFeedback.of(gram).round(weight, scales, fmt), _nearest(weight, scales, fmt))


@pytest.mark.parametrize("unit", [2.0**-20, 2.0**20])
def test_units_do_not_matter(unit: float) -> None:
    fmt, weight = get_format("e2m1"), _weight()
    scales, gram = choose_scales(weight, fmt, GROUP, "absmax"), _inputs(1).T @ _inputs(1)
    expected = ErrorFeedback.of(gram).round(weight, scales, fmt)
    assert torch.equal(ErrorFeedback.of(gram * unit).round(weight * unit, scales * unit, fmt), expected)


def test_inputs_that_never_occur_are_rounded_to_nearest() -> None:
    fmt, weight, x = get_format("e2m1"), _weight(), _inputs(1)
    x[:, 40:60] = 0.0
    scales = choose_scales(weight, fmt, GROUP, "absmax")
    values = ErrorFeedback.of(x.T @ x).round(weight, scales, fmt)
    assert torch.equal(values[:, 40:60], _nearest(weight, scales, fmt)[:, 40:60])
    nothing = ErrorFeedback.of(torch.zeros(COUNT, COUNT)).round(weight, scales, fmt)
    assert torch.equal(nothing, _nearest(weight, scales, fmt))


def test_a_damaged_gram_matrix_is_an_error() -> None:
    gram = torch.eye(4)
    gram[1, 1] = torch.nan
    with pytest.raises(ValueError, match="not positive definite"):
        ErrorFeedback.of(gram)
    with pytest.raises(ValueError, match="not positive definite"):
        ErrorFeedback.of(torch.tensor([[1.0, 5.0], [5.0, 1.0]]))


def _layer() -> LayerPlan:
    return LayerPlan(
        name="blocks.0.proj",
        out_features=ROWS,
        in_features=COUNT,
        has_bias=False,
        weight_format="e2m1",
        activation_format="e2m3",
        group_size=GROUP,
        scales="foldable",
        container="int8",
    )


def test_what_was_gained_is_the_output_s_error() -> None:
    fmt, weight, x = get_format("e2m1"), _weight(), _inputs(1)
    nearest = round_to_nearest(weight, choose_scales(weight, fmt, GROUP, "mse"), fmt)
    rounded, gained = round_with_feedback(_layer(), weight, nearest, ErrorFeedback.of(x.T @ x))
    power = float((x.double() @ weight.double().T).square().sum())
    values = torch.tensor(fmt.values)[rounded.codes.int()]
    assert gained.name == "blocks.0.proj"
    assert gained.error_calibrated == pytest.approx(_error(weight, values, rounded.scales, x) / power, rel=1e-3)
    assert gained.error_calibrated < 0.2 * gained.error_start
    assert torch.equal(rounded.scales, nearest.scales)


def test_nearest_stays_where_nothing_is_gained() -> None:
    fmt, weight = get_format("e2m1"), _weight()
    nearest = round_to_nearest(weight, choose_scales(weight, fmt, GROUP, "mse"), fmt)
    rounded, gained = round_with_feedback(_layer(), weight, nearest, ErrorFeedback.of(torch.eye(COUNT)))
    assert rounded is nearest
    assert gained.error_calibrated == gained.error_start
