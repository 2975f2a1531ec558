"""Blocks are judged on given inputs, so only the wrong one is named; the whole model runs free."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from exporter.errors import FidelityError
from exporter.gate.subgraphs import CutError
from exporter.gate.whole import compare_blocks, compare_end_to_end
from tests.exporter.gate.hand_made import Example

NAMES = [("stem", "blocks.0.input"), ("block", "blocks.0"), ("block", "blocks.1"), ("tail", "sample")]


def failing(example: Example, model: onnx.ModelProto, path: Path) -> list[str]:
    rows = compare_blocks(model, example.reference, "lowered", path, optimized=True)
    assert [(row.kind, row.name) for row in rows] == NAMES
    return [row.name for row in rows if not row.passed]


def test_a_right_graph_passes(example: Example, tmp_path: Path) -> None:
    assert failing(example, example.model, tmp_path / "blocks.onnx") == []
    onnx.save(example.model, tmp_path / "model.onnx")
    row = compare_end_to_end(tmp_path / "model.onnx", example.reference, "lowered", optimized=True)
    assert row.passed
    assert (row.kind, row.threshold_db) == ("end_to_end", 50.0)


@pytest.mark.parametrize(
    ("initializer", "name"),
    [
        ("offset", "blocks.0.input"),
        ("blocks.0.fc.bias", "blocks.0"),
        ("blocks.1.fc.bias", "blocks.1"),
        ("gain", "sample"),
    ],
)
def test_only_the_wrong_part_is_named(example: Example, tmp_path: Path, initializer: str, name: str) -> None:
    wrong = example.with_array(initializer, example.array(initializer) * np.float32(1.1))
    assert failing(example, wrong, tmp_path / "blocks.onnx") == [name]
    onnx.save(wrong, tmp_path / "model.onnx")
    assert not compare_end_to_end(tmp_path / "model.onnx", example.reference, "lowered", optimized=True).passed


def test_a_graph_without_a_block_is_refused(example: Example, tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(example.model)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["renamed" if name == "blocks.0.output" else name for name in names]
    with pytest.raises(CutError, match=r"blocks\.0\.output"):
        compare_blocks(model, example.reference, "lowered", tmp_path / "blocks.onnx", optimized=True)


def test_another_models_inputs_are_refused(example: Example, tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(example.model)
    model.graph.input[0].name = model.graph.node[0].input[0] = "y"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(FidelityError, match="y"):
        compare_end_to_end(tmp_path / "model.onnx", example.reference, "lowered", optimized=True)
