"""Both graphs of an export, compared side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from exporter.errors import FidelityError
from exporter.gate import segments
from exporter.gate.comparison import compare_graph, compare_graphs
from exporter.gate.table import GateResult
from exporter.passes.layer_table import write_layer_table
from exporter.progress import NullProgress
from exporter.targets import get_target
from tests.exporter.gate.hand_made import Example

CPU = get_target("cpu")


@pytest.fixture
def compare(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[onnx.ModelProto, onnx.ModelProto], GateResult]:
    """As large graphs are compared."""
    monkeypatch.setattr(segments, "LARGEST_WHOLE", 0)

    def compared(exported: onnx.ModelProto, lowered: onnx.ModelProto) -> GateResult:
        paths = [tmp_path / "exported.onnx", tmp_path / "lowered.onnx"]
        for path, model in zip(paths, (exported, lowered), strict=True):
            onnx.save(model, path)
        return compare_graphs(*paths, example.reference, tmp_path, CPU, NullProgress())

    return compared


@pytest.fixture
def model(example: Example) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(example.model)
    write_layer_table(model, example.layers, CPU.name)
    return model


def without_block(model: onnx.ModelProto, block: int) -> onnx.ModelProto:
    """The model with another name for what a block gives."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for node in changed.graph.node:
        for names in (node.input, node.output):
            names[:] = ["hidden" if name == f"blocks.{block}.output" else name for name in names]
    return changed


def test_both_get_the_rows_that_each_gets_alone(
    compare: Callable[..., GateResult], model: onnx.ModelProto, example: Example, tmp_path: Path
) -> None:
    both = compare(model, model)
    alone = compare_graph(tmp_path / "lowered.onnx", "lowered", example.reference, tmp_path, CPU, NullProgress())
    assert both.passed
    assert [row for row in both.rows if row.stage == "lowered"] == list(alone.rows)
    assert [row.stage for row in both.rows] == ["exported"] * len(alone.rows) + ["lowered"] * len(alone.rows)
    # An export writes the files of the last one, the end to end's, alone.
    assert both.commands == alone.commands[-1:]


def test_what_stops_the_exported_graph_is_named_first(
    compare: Callable[..., GateResult], model: onnx.ModelProto
) -> None:
    with pytest.raises(FidelityError, match=r"exported\.onnx: the graph has no tensor named 'blocks\.1\.output'"):
        compare(without_block(model, 1), without_block(model, 0))


def test_what_stops_the_lowered_graph_is_named(compare: Callable[..., GateResult], model: onnx.ModelProto) -> None:
    with pytest.raises(FidelityError, match=r"lowered\.onnx: the graph has no tensor named 'blocks\.0\.output'"):
        compare(model, without_block(model, 0))
