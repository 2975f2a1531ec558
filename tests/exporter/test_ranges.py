"""Ranges: measured by the graph itself, and refused with the place of the first number that is too large."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from exporter.errors import InputError
from exporter.passes import WAIST_PASSES, run_passes
from exporter.ranges import Amax, check_amax, measure_amax
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import WaistGraph, make_weight, run, tokens

RTX = TARGETS["rtx-sm89"]


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """x → blocks.0.fc → its square, times a constant."""
    waist = WaistGraph()
    y = waist.linear("x", make_weight("blocks.0.fc", features=64))
    squared = waist.node("Mul", y, y, output="squared")
    model = waist.model(waist.node("Mul", squared, waist.constant("c", np.float32(3)), output="out"))
    waist_model, _ = run_passes(model, WAIST_PASSES, RTX)
    onnx.save(waist_model, tmp_path / "exported.onnx")
    return tmp_path / "exported.onnx"


def test_amax_is_that_of_the_tensors_over_all_inputs(exported: Path) -> None:
    feeds = [tokens(seed=seed) for seed in (0, 1)]
    found = {one.tensor: one for one in measure_amax(exported, RTX, [{"x": feed} for feed in feeds])}
    assert list(found) == ["blocks.0.fc.output", "squared", "out"]
    for name, one in found.items():
        values = [run(onnx.load(exported), feed, name)[-1] for feed in feeds]
        assert one.value == max(float(np.abs(value).max()) for value in values)
    assert found["squared"].place == "Mul 'squared' after blocks.0.fc.output"
    assert found["blocks.0.fc.output"].place == "blocks.0.fc.output"


def test_nan_is_kept(exported: Path) -> None:
    x = tokens()
    x[0, 0, 0] = np.nan
    found = measure_amax(exported, RTX, [{"x": tokens()}, {"x": x}, {"x": tokens()}])
    assert np.isnan(found[-1].value)
    with pytest.raises(InputError, match="reaches nan"):
        check_amax("r", found)


def test_the_first_that_leaves_no_room_is_named() -> None:
    good = Amax("a", "blocks.0.a", 32752.0)
    assert check_amax("r", [good, Amax("b", "b", 5.0)]) == good
    bad = [good, Amax("b", "MatMul 'b' after blocks.0.a", 32753.0), Amax("c", "c", 1e9)]
    with pytest.raises(InputError, match=r"^r: compute: fp16: MatMul 'b' after blocks\.0\.a reaches 3\.275e\+04.*bf16"):
        check_amax("r", bad)
