"""Kinds of scales side by side: what a layer's formats and its target allow, measured alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from exporter.layer_bytes import stored_bytes
from exporter.layer_section import Scales
from exporter.method_section import MethodSection
from exporter.plan import LayerPlan
from exporter.scale_comparison import LayerScales, compare_scales, summarize
from exporter.targets import TARGETS

ROWS, COUNT, GROUP = 256, 128, 32
METHOD = MethodSection()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(COUNT, ROWS), nn.Linear(ROWS, COUNT))
    with torch.no_grad():
        # Groups of unequal size, as trained weights have them.
        model[0].weight.mul_(torch.logspace(-1, 1, COUNT // GROUP, base=3.0).repeat_interleave(GROUP))
    return model


def layer(scales: Scales = "foldable", weight: str = "e2m1", activation: str = "e2m3", name: str = "0") -> LayerPlan:
    shape = (ROWS, COUNT) if name == "0" else (COUNT, ROWS)
    return LayerPlan(name, *shape, True, weight, activation, 0 if scales == "channel" else GROUP, scales, "int8")


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"0": torch.randn(256, COUNT, generator=generator), "1": torch.randn(256, ROWS, generator=generator)}


def compare(model: nn.Module, *layers: LayerPlan, target: str = "cpu") -> tuple[LayerScales, ...]:
    return compare_scales(model, layers, inputs(), METHOD, TARGETS[target])


def test_foldable_scales_come_close_to_free_ones_at_the_container_of_channel_scales(model: nn.Module) -> None:
    (found,) = compare(model, layer())
    channel, group, foldable = found.kinds
    assert [kind.kind for kind in found.kinds] == ["channel", "group", "foldable"]
    assert found.chosen == "foldable"
    assert channel.snr_db + 1 < foldable.snr_db < group.snr_db + 0.5
    assert [kind.runs_in for kind in found.kinds] == ["int8, exact", "fp32", "int8, exact"]
    assert channel.stored_bytes < foldable.stored_bytes < group.stored_bytes
    assert foldable.stored_bytes == stored_bytes(layer(), TARGETS["cpu"])


def test_the_same_kind_measures_the_same_whatever_the_recipe_chose(model: nn.Module) -> None:
    (by_group,), (by_foldable,) = compare(model, layer("group")), compare(model, layer())
    assert by_group.kinds == by_foldable.kinds
    assert by_group.chosen == "group"


def test_layers_without_groups_are_left_out(model: nn.Module) -> None:
    assert compare(model, layer("channel")) == ()
    assert summarize(()) == ()


def test_block_scaling_is_left_out(model: nn.Module) -> None:
    blocks = LayerPlan("0", ROWS, COUNT, True, "e2m1", "e2m1", 16, "nvfp4", "fp32")
    assert [found.layer for found in compare(model, blocks, layer(name="1"))] == ["1"]


def test_formats_that_do_not_fold_have_two_kinds(model: nn.Module) -> None:
    (found,) = compare(model, layer("group", "e3m0"))
    assert [kind.kind for kind in found.kinds] == ["channel", "group"]


def test_what_the_target_refuses_says_so(model: nn.Module) -> None:
    (found,) = compare(model, layer(), target="rtx-sm86")
    assert [kind.runs_in for kind in found.kinds] == ["int8, exact", "refused", "int8, exact"]


def test_the_summary_counts_layers_that_have_every_kind(model: nn.Module) -> None:
    compared = compare(model, layer(), layer(name="1"))
    summary = summarize(compared)
    assert [(entry.kind, entry.layers) for entry in summary] == [("channel", 2), ("group", 2), ("foldable", 2)]
    assert summary[2].mean_db == pytest.approx(sum(found.kinds[2].snr_db for found in compared) / 2)
    assert summary[2].stored_bytes == sum(found.kinds[2].stored_bytes for found in compared)
    mixed = summarize((*compared, *compare(model, layer("group", "e3m0"))))
    assert mixed == summary
