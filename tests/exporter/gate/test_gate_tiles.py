"""A tiled file must compute the very bits of the graph that is compared in its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from exporter.gate.tiles import compare_tiles
from tests.exporter.gate.hand_made import Example


def test_equal_graphs_pass(example: Example, tmp_path: Path) -> None:
    onnx.save(example.model, tmp_path / "model.onnx")
    row = compare_tiles(tmp_path / "model.onnx", example.model, example.reference, "lowered", tmp_path / "whole.onnx")
    assert row.passed
    assert (row.kind, row.name) == ("tiles", "sample")


def test_one_changed_bit_fails(example: Example, tmp_path: Path) -> None:
    onnx.save(example.model, tmp_path / "model.onnx")
    gain = example.array("gain")
    other = example.with_array("gain", np.nextafter(gain, np.float32(2) * gain))
    row = compare_tiles(tmp_path / "model.onnx", other, example.reference, "lowered", tmp_path / "whole.onnx")
    assert not row.passed
    assert "other bits" in row.sentence()
