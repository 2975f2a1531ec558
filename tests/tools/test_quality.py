"""The comparison: rows are what they claim, the page shows what is kept, the prose says what the cells say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from exporter import load_recipe
from exporter.calibration.nearest import nearest_weight
from exporter.calibration_stages import captured_inputs
from exporter.models.loading import model_shapes
from exporter.models.pixart import PixArtAdapter
from exporter.plan import LayerPlan, Plan, plan_layers
from exporter.progress import NullProgress
from exporter.quantize import QuantizedWeight, QuantLinear, planned_linear, quantize_model
from exporter.rounding import InputQuantizer, round_to_format
from exporter.source import load_source
from exporter.targets import TARGETS
from plugins.formats import FORMATS, get_format
from tools.quality_cells.cells import Figures, Laboratory
from tools.quality_cells.chart import draw
from tools.quality_cells.figures import Interval, signal_to_noise_db
from tools.quality_cells.layers import quantize_with_zero_point, with_decoded_weights, with_zero_points
from tools.quality_cells.page import markdown
from tools.quality_cells.published_loop import GROUP, PublishedLinear
from tools.quality_cells.quantized import Quantized
from tools.quality_cells.rows import BATCH, ROWS, SEEDS, W4A6, Bits, Row, row_of
from tools.quality_cells.verdict import verdict

MEASURED_BY = ("0123456789ab", "2.0")
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "digits.yaml"


PLANNED = LayerPlan(
    name="0",
    out_features=8,
    in_features=256,
    has_bias=True,
    weight_format="int4",
    activation_format="int8",
    group_size=128,
    scales="group",
    container="fp32",
)


@pytest.mark.parametrize(
    ("row", "bits"), [pytest.param(row, bits, id=f"{row.key}-{bits.name}") for row in ROWS for bits in row.at]
)
def test_every_cell_is_a_recipe_of_the_widths_it_claims(row: Row, bits: Bits) -> None:
    recipe = load_recipe(RECIPE, row.changes(bits), "cpu")
    adapter = PixArtAdapter()
    width = {"num_attention_heads": 4, "attention_head_dim": 64, "cross_attention_dim": 256}
    model = adapter.create({"num_layers": 1, "sample_size": 8, **width})
    plan = plan_layers(recipe, model_shapes(model, adapter), adapter.kept_layers(model), TARGETS["cpu"])
    assert len(plan.layers) == 10
    for layer in plan.layers:
        weight, activation = FORMATS[layer.weight_format], FORMATS[layer.activation_format]
        assert f"W{weight.bits}A{activation.bits}" == bits.name
        assert layer.weight_format.startswith("int") == (row.formats == "integers")
        assert layer.activation_format.startswith("int") == (row.formats in ("integers", "mixed"))
        assert layer.group_size == 128


def test_the_published_loop_has_the_batches_of_all_other_rows() -> None:
    for row in ROWS:
        assert load_recipe(RECIPE, row.changes(W4A6), "cpu").method.batch_size == BATCH, row.key


def test_seeds_share_no_trajectory() -> None:
    samples = load_recipe(RECIPE).calibration.samples
    assert min(np.diff(SEEDS)) >= samples


def test_verdicts_need_seeds_that_agree() -> None:
    assert [verdict(found) for found in ([0.5], [0.1, 2.0], [-0.1, -2.0], [0.1, -0.1])] == [
        "one seed",
        "floats closer",
        "integers closer",
        "no difference",
    ]


def test_the_page_is_what_the_kept_cells_make(tmp_path: Path) -> None:
    cells = ROOT / "docs" / "quality"
    digits = Laboratory(RECIPE, tmp_path, cells / "digits", NullProgress())
    shapes = Laboratory(ROOT / "build" / "shapes" / "shapes.yaml", tmp_path, cells / "shapes", NullProgress())
    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    written, _, sections = page.partition("\n\n<!--")
    assert written == markdown(digits, shapes).rstrip()
    assert "activations" in sections
    assert "speed" in sections


def test_the_page_shows_what_is_kept_and_how_many_seeds(tmp_path: Path) -> None:
    laboratory, other = (Laboratory(RECIPE, tmp_path, tmp_path / name, NullProgress()) for name in ("digits", "shapes"))
    assert "Not measured yet." in markdown(laboratory, other)
    row, floats = row_of("int_nearest"), row_of("fp_nearest")
    laboratory._keep(floats, W4A6, SEEDS[0], Figures(43.5, 30.0, 25.0, 7.0, *MEASURED_BY))
    for seed, snr, distance in zip(SEEDS, (40.0, 42.0), (Interval(5.0, 2.5, 7.5), Interval(6.0)), strict=False):
        figures = Figures(snr, 30.0, 25.0, 7.0, *MEASURED_BY, 2000, Interval(0.99, 0.98, 1.0), distance, "a GPU")
        laboratory._keep(row, W4A6, seed, figures)
        assert laboratory.cell(row, W4A6, seed, samples=2000) == figures
    page = markdown(laboratory, other)
    line = next(line for line in page.splitlines() if line.startswith(f"| {row.title}"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["41.0 ± 1.4", "30.0 ± 0.0", "25.0 ± 0.0"]
    assert "| round to nearest; integers around zero | +3.5 |" in page
    assert "| round to nearest; integers with zero points | – |" in page
    assert "3 cells by program `0123456789ab` with PyTorch 2.0" in page
    assert cells[4:] == ["99.0 ± 0.0 % (98.0 … 100.0)", "5.5 ± 0.7 (2.5 … 7.5)", "7", "2 (2)"]
    assert f"| {floats.title} | 43.5 | 30.0 | 25.0 | – | – | 7 | 1 (0) |" in page
    assert "Samples were drawn: of 2 cells by a GPU." in page


def test_the_chart_has_a_dot_for_every_cell_that_is_kept(tmp_path: Path) -> None:
    laboratory = Laboratory(RECIPE, tmp_path, tmp_path / "cells", NullProgress())
    pictures = []
    for snr in (40.0, 40.0, 45.0):
        laboratory._keep(ROWS[0], W4A6, SEEDS[1], Figures(snr, 30.0, 25.0, 7.0, *MEASURED_BY))
        laboratory._keep(ROWS[-1], W4A6, SEEDS[0], Figures(50.0, 30.0, 25.0, 7.0, *MEASURED_BY))
        draw(laboratory, tmp_path / "chart.svg")
        pictures.append((tmp_path / "chart.svg").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_cells_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    recipe, row = tmp_path / "recipe.yaml", ROWS[0]
    recipe.write_text(
        RECIPE.read_text(encoding="utf-8").replace(": digits", f": {RECIPE.parent}/digits"), encoding="utf-8"
    )
    laboratory = Laboratory(recipe, tmp_path, tmp_path / "cells", NullProgress())
    laboratory._keep(row, W4A6, 0, Figures(43.5, 30.0, 25.0, 7.0, *MEASURED_BY))
    assert laboratory.kept(row, W4A6, 0) is not None
    (tmp_path / "cells" / f"W4A6.{row.key}.0.json").rename(tmp_path / "cells" / f"W4A6.{row.key}.1000.json")
    assert laboratory.kept(row, W4A6, 1000) is None


def test_zero_points_spend_all_steps_on_one_sided_tokens() -> None:
    x = torch.tensor([[0.0, 1.0, 2.5, 15.0], [-3.0, 0.0, 4.4, 12.0], [0.0, 0.0, 0.0, 0.0], [-30.0, -4.0, -1.0, -2.9]])
    found = quantize_with_zero_point(x, bits=4)
    expected = torch.tensor([[0.0, 1.0, 2.0, 15.0], [-3.0, 0.0, 4.0, 12.0], [0.0] * 4, [-30.0, -4.0, 0.0, -2.0]])
    torch.testing.assert_close(found, expected)
    noise = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).abs()
    around_zero = InputQuantizer(get_format("int4")).fake_quantize(noise)
    error, other = (
        (quantized - noise).square().mean() for quantized in (quantize_with_zero_point(noise, 4), around_zero)
    )
    # 15 steps of the range instead of 7.
    assert float(other / error) == pytest.approx((15 / 7) ** 2, rel=0.1)


def test_zero_points_are_given_to_every_quantized_layer_and_change_inputs_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 8), nn.Linear(8, 3))
    weight = QuantizedWeight(torch.randint(0, 15, (8, 256), dtype=torch.uint8), torch.full((8, 2), 0.25))
    plan = Plan(layers=(PLANNED,), high_precision=(), fp32_bytes=0, expected_bytes=0)
    quantized = quantize_model(model, plan, {"0": weight})
    x = torch.randn(5, 256)
    inputs = quantize_with_zero_point(x, 8)
    expected = model[1](F.linear(inputs, weight.dequantize(get_format("int4")), model[0].bias))
    torch.testing.assert_close(with_zero_points(quantized)(x), expected)
    assert float((with_zero_points(quantized)(x) - quantized(x)).abs().max()) > 0


@pytest.mark.parametrize("activation", ["int8", "none"])
def test_weights_decoded_once_change_no_bit(activation: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 8), nn.Linear(8, 3))
    weight = QuantizedWeight(torch.randint(0, 15, (8, 256), dtype=torch.uint8), torch.full((8, 2), 0.25))
    plan = Plan(
        layers=(replace(PLANNED, activation_format=activation),), high_precision=(), fp32_bytes=0, expected_bytes=0
    )
    quantized = quantize_model(model, plan, {"0": weight})
    decoded, x = with_decoded_weights(quantized), torch.randn(5, 256)
    assert not any(isinstance(module, QuantLinear) for module in decoded.modules())
    assert torch.equal(decoded(x), quantized(x))


@pytest.mark.slow
def test_compiled_a_cell_predicts_the_same_noise(tmp_path: Path) -> None:
    laboratory = Laboratory(RECIPE, tmp_path, tmp_path / "cells", NullProgress())
    job = laboratory.job(("calibration.samples=1",), "original")
    original = load_source(job)
    weights = {
        layer.name: nearest_weight(planned_linear(original.model, layer).weight, layer, None, "absmax")
        for layer in original.plan.layers
    }
    model = quantize_model(original.model, original.plan, weights)
    cell = Quantized(model, original.adapter, 0.0)
    compiled, captured = cell.compiled(), captured_inputs(job, original)
    inputs = captured.inputs(torch.arange(4), original.prompts)
    with torch.no_grad():
        # The first call is not compiled yet.
        assert torch.equal(compiled(inputs), cell.denoiser(inputs))
        predictions = [denoiser(inputs).numpy() for denoiser in (cell.denoiser, compiled, original.denoiser)]
    reference, found, exact = predictions
    # Another order of sums lets some numbers fall to the other side of a tie.
    assert signal_to_noise_db(reference, found) > signal_to_noise_db(reference, exact) + 10


@pytest.mark.parametrize(("mantissa", "name"), [(1, "e2m1"), (0, "e3m0"), (2, "e1m2")])
def test_the_published_loop_rounds_on_the_same_grid(mantissa: int, name: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(2 * GROUP, 4)
    layer, fmt = PublishedLinear(linear, mantissa), get_format(name)
    scales = linear.weight.reshape(-1, GROUP).abs().amax(dim=1, keepdim=True) / fmt.max
    units = linear.weight.detach().reshape(-1, GROUP) / scales
    found = layer.quantized().detach().reshape(-1, GROUP) / scales
    torch.testing.assert_close(round_to_format(found, fmt), found, rtol=1e-4, atol=1e-4)
    if mantissa:  # E3M0's ties are between the values here, by the exponent there
        assert float((found - round_to_format(units, fmt)).abs().gt(1e-3).float().mean()) < 0.01
    layer.soft = True
    torch.testing.assert_close(layer.quantized(), linear.weight, rtol=1e-3, atol=1e-4)
