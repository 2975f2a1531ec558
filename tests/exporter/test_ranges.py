"""Ranges: measured by the graph itself, and refused with the place of the first number that is too large."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporter import ranges
from exporter.errors import InputError
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.passes.emulate import emulation_passes
from exporter.ranges import Amax, check_amax, measure_amax
from exporter.runtime import OnnxSession
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import WaistGraph, make_weight, reference, run, tokens

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


@pytest.mark.parametrize("activation", ["none", "e2m3"])
@pytest.mark.parametrize("bias", [True, False])
def test_products_that_turing_rounds_to_fp16_are_measured(tmp_path: Path, activation: str, bias: bool) -> None:
    waist, turing, x = WaistGraph(), TARGETS["rtx-sm75"], tokens()
    y = waist.linear("x", make_weight("blocks.0.fc", features=64, bias=bias), activation)
    exported, _ = run_passes(waist.model(waist.node("Neg", y, output="out")), WAIST_PASSES, turing)
    path = tmp_path / "exported.onnx"
    onnx.save(exported, path)
    found = {one.tensor: one.value for one in measure_amax(path, turing, [{"x": x}])}
    assert "blocks.0.fc.product" not in {one.tensor for one in measure_amax(path, RTX, [{"x": x}])}
    # Integers times a power of two are bounded by the weights, whatever comes in.
    assert ("blocks.0.fc.product" in found) == (activation == "none")
    if activation == "none":
        lowered, _ = run_passes(exported, lowering_passes(turing), turing)
        (product,) = (node.output[0] for node in lowered.graph.node if node.op_type == "MatMul")
        computed = run(run_passes(lowered, emulation_passes(turing), turing)[0], x, product)[-1]
        assert found["blocks.0.fc.product"] == pytest.approx(np.abs(computed).max(), rel=2e-3)


def test_a_product_too_large_is_named_where_the_bias_hides_it(tmp_path: Path) -> None:
    waist, turing = WaistGraph(), TARGETS["rtx-sm75"]
    weight = make_weight("blocks.0.fc", features=64)
    x = np.tile(1e5 * tokens()[0, 0], (2, 5, 1)).astype(np.float32)
    hiding = replace(weight, bias=-reference(x, replace(weight, bias=None), "none")[1][0, 0])
    model = waist.model(waist.node("Neg", waist.linear("x", hiding, "none"), output="out"))
    onnx.save(run_passes(model, WAIST_PASSES, turing)[0], tmp_path / "exported.onnx")
    found = measure_amax(tmp_path / "exported.onnx", turing, [{"x": x}])
    assert max(one.value for one in found if one.tensor == "blocks.0.fc.output") < 10
    with pytest.raises(
        InputError, match=r"^r: compute: fp16: blocks\.0\.fc\.product reaches.*rtx-sm75 has nothing wider"
    ):
        check_amax("r", found, turing)


def test_the_probed_graph_is_a_file_of_any_size(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime takes no model of 2 GiB that is not in a file."""
    opened: list[object] = []

    class Session(OnnxSession):
        def __init__(self, source: Path) -> None:
            opened.append(source)
            super().__init__(source)

    monkeypatch.setattr(ranges, "OnnxSession", Session)
    measure_amax(exported, RTX, [{"x": tokens()}])
    (path,) = opened
    assert isinstance(path, Path)
    assert path.parent.parent == exported.parent
    assert list(exported.parent.iterdir()) == [exported]


def test_nan_is_kept(exported: Path) -> None:
    x = tokens()
    x[0, 0, 0] = np.nan
    found = measure_amax(exported, RTX, [{"x": tokens()}, {"x": x}, {"x": tokens()}])
    assert np.isnan(found[-1].value)
    with pytest.raises(InputError, match="reaches nan"):
        check_amax("r", found, RTX)


def test_the_first_that_leaves_no_room_is_named() -> None:
    good = Amax("a", "blocks.0.a", 32752.0)
    assert check_amax("r", [good, Amax("b", "b", 5.0)], RTX) == good
    bad = [good, Amax("b", "MatMul 'b' after blocks.0.a", 32753.0), Amax("c", "c", 1e9)]
    with pytest.raises(InputError, match=r"^r: compute: fp16: MatMul 'b' after blocks\.0\.a reaches 3\.275e\+04.*bf16"):
        check_amax("r", bad, RTX)
