"""Gelu is spelt out where a parser might lack it, and stays elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.passes import run_passes
from exporter.passes.compute_type import compute_in_fp16
from exporter.passes.emulate_compute import round_to_compute_type
from exporter.passes.gelu import spell_out_gelu
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import WaistGraph, op_types, run, snr_db, tokens


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_it_stays_the_same_function(approximate: str) -> None:
    waist = WaistGraph()
    model = waist.model(waist.node("Gelu", "x", output="y", approximate=approximate))
    spelt, (result,) = run_passes(model, (spell_out_gelu,), TARGETS["orin"])
    assert result.changed == 1
    assert "Gelu" not in op_types(spelt)
    x = np.clip(tokens(), -20, 20)
    assert snr_db(run(model, x)[0], run(spelt, x)[0]) > 120


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_it_is_computed_in_fp32_beside_fp16(approximate: str) -> None:
    waist = WaistGraph()
    minus = waist.node("Neg", "x", output="minus")
    model = waist.model(waist.node("Neg", waist.node("Gelu", minus, output="h", approximate=approximate), output="y"))
    low, _ = run_passes(model, (compute_in_fp16, spell_out_gelu), TARGETS["orin"])
    x = np.clip(tokens(), -20, 20).astype(np.float16).astype(np.float32)
    rounded, _ = run_passes(low, (round_to_compute_type,), TARGETS["orin"])
    # One rounding of the result, not of what it is made of.
    assert snr_db(run(model, x)[0], run(rounded, x)[0]) > 70


def test_the_two_kinds_are_told_apart() -> None:
    def spelt(approximate: str) -> list[str]:
        waist = WaistGraph()
        model = waist.model(waist.node("Gelu", "x", output="y", approximate=approximate))
        return op_types(run_passes(model, (spell_out_gelu,), TARGETS["h100"])[0])

    assert "Tanh" in spelt("tanh")
    assert "Erf" in spelt("none")


@pytest.mark.parametrize("target", ["cpu", "rtx-sm86", "b200"])
def test_it_stays_where_every_parser_takes_it(target: str) -> None:
    waist = WaistGraph()
    model = waist.model(waist.node("Gelu", "x", output="y"))
    lowered, (result,) = run_passes(model, (spell_out_gelu,), TARGETS[target])
    assert (result.changed, op_types(lowered)) == (0, ["Gelu"])


def test_a_runtime_s_own_gelu_stays() -> None:
    waist = WaistGraph()
    model = waist.model(waist.node("Gelu", "x", output="y", domain="com.microsoft"))
    model.opset_import.add(domain="com.microsoft", version=1)
    assert run_passes(model, (spell_out_gelu,), TARGETS["orin"])[1][0].changed == 0
