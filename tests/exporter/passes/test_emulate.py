"""Whether a lowered graph needs a stand-in is known without its weights, and is what the passes would find."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from exporter.compute import Compute
from exporter.onnx_files import read_model, save_onnx
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.passes.emulate import emulation_passes, runs_as_it_is
from exporter.targets import TARGETS
from plugins.block_scales import BLOCK_SCALINGS
from tests.exporter.passes.plugins.plugin_graphs import lowered as with_plugins
from tests.exporter.passes.plugins.plugin_graphs import opened
from tests.exporter.passes.test_lower_blocks import block_linear
from tests.exporter.passes.waist_graphs import WaistGraph, make_weight, one_linear, op_types


def _lowered(model: onnx.ModelProto, target: str, compute: Compute = "fp32") -> onnx.ModelProto:
    return run_passes(model, (*WAIST_PASSES, *lowering_passes(TARGETS[target], compute)), TARGETS[target])[0]


def _changes(model: onnx.ModelProto, target: str) -> int:
    _, results = run_passes(model, emulation_passes(TARGETS[target]), TARGETS[target])
    return sum(result.changed for result in results)


@pytest.mark.parametrize("activation_format", ["e2m3", "e4m3", "none"])
def test_standard_operators_of_types_that_onnx_runtime_has_stay(activation_format: str, tmp_path: Path) -> None:
    lowered = _lowered(one_linear(make_weight("fc", group_size=0), activation_format), "rtx-sm89")
    assert _changes(lowered, "rtx-sm89") == 0
    save_onnx(lowered, tmp_path / "lowered.onnx", largest=100)
    assert runs_as_it_is(read_model(tmp_path / "lowered.onnx", external_data=False))


@pytest.mark.parametrize("compute", ["fp16", "bf16"])
def test_a_compute_type_needs_a_stand_in(compute: Compute) -> None:
    waist = WaistGraph()
    y = waist.linear("x", make_weight("fc"), "e2m3")
    lowered = _lowered(waist.model(waist.node("Add", y, y, output="doubled")), "rtx-sm89", compute)
    assert _changes(lowered, "rtx-sm89")
    assert not runs_as_it_is(lowered)


@pytest.mark.parametrize("name", BLOCK_SCALINGS)
def test_tensorrt_s_own_operators_need_a_stand_in(name: str) -> None:
    lowered = _lowered(block_linear(BLOCK_SCALINGS[name])[0], "rtx-sm120")
    assert _changes(lowered, "rtx-sm120")
    assert not runs_as_it_is(lowered)


def test_plugins_need_a_stand_in() -> None:
    lowered = with_plugins(one_linear(make_weight("fc")))
    assert op_types(opened(lowered)) != op_types(lowered)
    assert not runs_as_it_is(lowered)
