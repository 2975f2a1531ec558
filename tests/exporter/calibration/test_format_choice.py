"""Formats are chosen by what they cost the block's output, with its inputs quantized as planned."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from exporter.calibration.capture import CalibrationSet
from exporter.calibration.format_choice import LayerFormats, choose_formats, load_formats, save_formats
from exporter.calibration.input_statistics import InputStatistics
from exporter.calibration.inputs import CalibrationRun
from exporter.calibration.nearest import nearest_weight
from exporter.method_section import MethodSection
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.plan import OpenLayer, Plan
from exporter.progress import NullProgress
from exporter.rounding import InputQuantizer
from exporter.transforms.apply import with_transforms
from plugins.formats import get_format

METHOD = MethodSection(name="rtn", scale_search="mse")
FORMATS = ("e2m1", "e1m2", "e3m0")
OPEN = ("transformer_blocks.0.ff.net.2", "transformer_blocks.1.attn1.to_k", "transformer_blocks.1.ff.net.0.proj")
OUTSIDE = "proj_out"

Planner = Callable[..., Plan]


@pytest.fixture(scope="module")
def run(adapter: PixArtAdapter, captured: CalibrationSet, prompts: Prompts) -> CalibrationRun:
    return CalibrationRun(adapter, captured, prompts)


@dataclass(frozen=True)
class _Watched(CalibrationRun):
    """Notes of how many layers statistics are made at once."""

    asked: list[int] = field(default_factory=list)

    def input_statistics(
        self, model: nn.Module, layers: Iterable[str], largest_gram: int = 0
    ) -> dict[str, InputStatistics]:
        names = list(layers)
        self.asked.append(len(names))
        return super().input_statistics(model, names, largest_gram)


def opened(plan: Plan, *names: str) -> Plan:
    """The plan with these layers open, on one scale a row."""
    found = []
    for name in names:
        channel = replace(plan.layer(name), scales="channel", group_size=0)
        found.append(
            OpenLayer(tuple(replace(channel, weight_format=fmt) for fmt in FORMATS), {"e9m9": "too many bits"})
        )
    first = {layer.name: layer.candidates[0] for layer in found}
    return replace(plan, layers=tuple(first.get(layer.name, layer) for layer in plan.layers), open=tuple(found))


def test_every_layer_gets_the_format_whose_values_its_weights_are(
    model: nn.Module, run: CalibrationRun, plan_for: Planner
) -> None:
    made = copy.deepcopy(model)
    wanted = dict(zip((*OPEN, OUTSIDE), (*reversed(FORMATS), "e3m0"), strict=True))
    generator = torch.Generator().manual_seed(0)
    for name, fmt in wanted.items():
        weight = made.get_submodule(name).weight
        values = torch.tensor(get_format(fmt).values)
        drawn = values[torch.randint(len(values), weight.shape, generator=generator)]
        drawn[:, 0] = get_format(fmt).max
        weight.data = drawn * (0.3 / drawn.square().mean().sqrt())
    plan = opened(plan_for("transformer_blocks", OUTSIDE), *wanted)
    found = choose_formats(made, plan, run, METHOD, NullProgress())
    assert {layer.layer: layer.chosen for layer in found} == wanted
    assert {layer.unit for layer in found} == {"transformer_blocks.0", "transformer_blocks.1", OUTSIDE}


def test_errors_are_the_blocks_with_one_weight_changed(
    model: nn.Module, run: CalibrationRun, plan_for: Planner, tmp_path: Path
) -> None:
    plan = opened(plan_for(), OPEN[2])
    (found,) = choose_formats(model, plan, run, METHOD, NullProgress())
    inside = copy.deepcopy(model)
    block, quantizer = inside.transformer_blocks[1], InputQuantizer(get_format("e2m3"))
    seen: dict[bool, list[Tensor]] = {False: [], True: []}
    rounded = False
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: (quantizer.fake_quantize(args[0]),) if rounded else None)
    block.register_forward_hook(lambda _, args, output: seen[rounded].append(output))
    statistics = run.input_statistics(model, [OPEN[2]])[OPEN[2]]
    run.through(inside, {})
    exact, errors, rounded = torch.cat(seen[False]), {}, True
    linear = inside.get_submodule(OPEN[2])
    for candidate in plan.open[0].candidates:
        fmt = get_format(candidate.weight_format)
        weight = model.get_submodule(OPEN[2]).weight
        linear.weight = nn.Parameter(nearest_weight(weight, candidate, statistics, "mse").dequantize(fmt))
        seen[True].clear()
        run.through(inside, {})
        errors[fmt.name] = float((torch.cat(seen[True]) - exact).square().sum() / exact.square().sum())
    assert found.errors == pytest.approx(errors, rel=1e-3)
    assert list(found.errors) == list(FORMATS)
    save_formats(tmp_path / "formats.json", (found,))
    assert load_formats(tmp_path / "formats.json") == (found,)


def test_where_memory_is_short_the_errors_are_the_same(
    model: nn.Module, run: CalibrationRun, plan_for: Planner
) -> None:
    method = MethodSection(name="gptq", scale_search="output")
    plan = opened(plan_for("transformer_blocks", OUTSIDE), *OPEN, OUTSIDE)
    asked: list[int] = []
    whole, parts = (
        choose_formats(model, plan, _Watched(**{**vars(run), "memory": memory}, asked=asked), method, NullProgress())
        for memory in (None, 1 << 16)
    )
    assert whole == parts
    assert asked[0] == len(plan.layers)
    assert len(asked) > 5
    assert max(asked[1:]) < len(plan.layers) / 2


def test_outputs_of_the_block_s_layers_are_rounded_as_planned(
    model: nn.Module, run: CalibrationRun, plan_for: Planner
) -> None:
    plan, name = plan_for("transformer_blocks.1"), "transformer_blocks.1.attn1.to_v"
    rounded = replace(plan.layer(name), name=f"{name}.linear", output_format="e2m1")
    plan = replace(plan, layers=tuple(rounded if layer.name == name else layer for layer in plan.layers))
    changed = with_transforms(model, plan.layers, {})
    (found,) = choose_formats(changed, opened(plan, OPEN[2]), run, METHOD, NullProgress())
    plain = replace(plan, layers=tuple(replace(layer, output_format="none") for layer in plan.layers))
    (without,) = choose_formats(changed, opened(plain, OPEN[2]), run, METHOD, NullProgress())
    assert all(found.errors[fmt] > 1.01 * without.errors[fmt] for fmt in FORMATS)


def test_the_least_error_is_chosen_and_of_equal_ones_the_first() -> None:
    assert LayerFormats("a", "b", {"e2m1": 2.0, "e1m2": 1.0, "e3m0": 1.0}, {}).chosen == "e1m2"
    assert LayerFormats("a", "b", {"e2m1": math.nan, "e1m2": math.inf, "e3m0": 1e9}, {}).chosen == "e3m0"
    assert LayerFormats("a", "b", {"e2m1": 1e-3, "e1m2": 0.0}, {}).snr_db == {"e2m1": pytest.approx(30), "e1m2": 200}
