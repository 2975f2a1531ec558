"""Blocks are judged on given inputs, so only the wrong one is named; the whole model runs free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporter.errors import FidelityError
from exporter.gate.records import Reference
from exporter.gate.subgraphs import CutError
from exporter.gate.whole import compare_blocks, compare_end_to_end
from exporter.passes.layer_table import LayerEntry, read_layer_table
from exporter.passes.tiling import untiled
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


@pytest.mark.slow
def test_a_dropped_mask_fails_its_block_by_what_enters_a_linear(tiny_export: Path, tmp_path: Path) -> None:
    """The residual stream hides it from the block's output."""
    reference = Reference.load(tiny_export.with_name("tiny.work") / "gate.cpu").for_stage("lowered")
    model = untiled(onnx.load(tiny_export))
    layers = read_layer_table(model)
    attention = [node for node in model.graph.node if node.op_type == "MultiHeadAttention"][3]

    def failures(layers: Sequence[LayerEntry]) -> list[str]:
        path = tmp_path / "blocks.onnx"
        rows = compare_blocks(model, reference, "lowered", path, optimized=True, layers=layers)
        return [row.sentence() for row in rows if not row.passed]

    assert failures(layers) == []
    assert attention.input[5]
    attention.input[5] = ""
    assert failures([]) == []
    (sentence,) = failures(layers)
    assert sentence.startswith("block transformer_blocks.1 (lowered graph): what enters ")
    assert "transformer_blocks.1.attn2.to_out.0 has SNR" in sentence
    # polygraphy repeats the comparison on what is left, against a reference that knows the boundaries alone.
    kept = {value.name for value in onnx.load(tmp_path / "blocks.onnx").graph.output}
    assert kept <= set(reference.models[0].boundaries)
