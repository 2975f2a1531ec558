"""Large graphs are compared segment by segment, with the verdicts that the whole graph gets."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from exporter.errors import FidelityError
from exporter.gate import segments
from exporter.gate.records import Reference
from exporter.gate.segments import DividedGraph, SegmentedSession
from exporter.gate.snr import snr_db
from exporter.gate.table import GateResult
from exporter.models.inputs import TransformerInputs
from exporter.onnx_files import save_onnx
from exporter.passes.layer_table import read_layer_table
from exporter.ranges import measure_amax
from exporter.runtime import OnnxSession
from exporter.targets import TARGETS
from exporter.validate import validate_output
from tests.exporter.validated_export import ADAPTER, LAYER, QUIET, TAMPERINGS, Export, tampered


@pytest.mark.parametrize("target", ["cpu", "rtx-sm86"])
def test_a_large_graph_is_compared_in_segments_with_the_same_verdicts(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    whole = export.validate(export.path(target), tmp_path / "whole", target)
    monkeypatch.setattr(segments, "LARGEST_WHOLE", 0)
    parts = export.validate(export.path(target), tmp_path / "parts", target)
    assert [(row.kind, row.name, row.passed) for row in parts.rows] == [
        (row.kind, row.name, row.passed) for row in whole.rows
    ]
    # Fusions across the cuts may change the last bits of a result. What runs free does so on one sample of the batch,
    # which has a limit and an SNR of its own.
    given = [(part, row) for part, row in zip(parts.rows, whole.rows, strict=True) if row.kind != "end_to_end"]
    assert len(given) == len(whole.rows) - 2
    for part, row in given:
        assert part.threshold_db == row.threshold_db
        assert part.snr_db == pytest.approx(row.snr_db, abs=10)


def test_a_large_graph_runs_free_on_one_sample(export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export.validate(export.path("cpu"), tmp_path / "whole", "cpu")
    monkeypatch.setattr(segments, "LARGEST_WHOLE", 0)
    export.validate(export.path("cpu"), tmp_path / "parts", "cpu")
    batches = {}
    for folder in ("whole", "parts"):
        reference = Reference.load(tmp_path / folder)
        model = reference.models[0]
        batches[folder] = len(reference.free_output(model))
        assert {len(array) for array in reference.free_inputs(model).values()} == {batches[folder]}
        # Given its inputs every part is compared on all samples.
        assert len(model.boundaries["sample"]) == 2
    assert batches == {"whole": 2, "parts": 1}


@torch.no_grad()
def test_what_runs_free_is_held_to_the_worst_sample(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that is compared on the whole batch, or on any sample of it, has the same limit."""
    monkeypatch.setattr(segments, "LARGEST_WHOLE", 0)
    export.validate(export.path("cpu"), tmp_path, "cpu")
    reference = Reference.load(tmp_path)
    errors = []
    for model in reference.models:
        inputs = TransformerInputs.from_dict({name: torch.from_numpy(array) for name, array in model.inputs.items()})
        original, quantized = (
            ADAPTER.forward(net, ADAPTER.with_conditions(net, inputs)) for net in (export.original, export.quantized)
        )
        errors += [snr_db(one.numpy(), other.numpy()) for one, other in zip(original, quantized, strict=True)]
    assert max(errors) - min(errors) > 0.1
    assert reference.quantization_db == pytest.approx(min(errors), abs=0.05)
    assert reference.end_to_end_threshold == pytest.approx(min(errors) + 10, abs=0.05)


@pytest.mark.parametrize("change", TAMPERINGS)
def test_tampering_with_a_large_graph_is_caught(
    export: Export,
    gate: tuple[GateResult, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, np.ndarray]], str],
) -> None:
    monkeypatch.setattr(segments, "LARGEST_WHOLE", 0)
    folder = shutil.copytree(gate[1], tmp_path / "gate")
    output = tampered(export.path("cpu"), change, tmp_path / "output.onnx")
    with pytest.raises(FidelityError, match=LAYER):
        validate_output(output, folder, output, QUIET, built_sha256="")


def test_a_large_graph_s_layer_that_leads_nowhere_is_refused(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "LARGEST_WHOLE", 0)
    model = onnx.load(export.path("rtx-sm86"))
    query, key = [entry.output for entry in read_layer_table(model)][:2]
    for node in model.graph.node:
        node.input[:] = [query if name == key else name for name in node.input]
    onnx.save(model, tmp_path / "lowered.onnx")
    with pytest.raises(FidelityError, match=r"attn1\.to_k does not lead to the model's output"):
        export.validate(tmp_path / "lowered.onnx", tmp_path / "gate", "rtx-sm86")


def test_a_large_graph_s_weights_may_be_beside_it(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "LARGEST_WHOLE", 0)
    save_onnx(onnx.load(export.path("rtx-sm86")), tmp_path / "lowered.onnx", largest=100)
    one, two = (
        export.validate(path, tmp_path / str(index), "rtx-sm86")
        for index, path in enumerate((export.path("rtx-sm86"), tmp_path / "lowered.onnx"))
    )
    assert one.rows == two.rows


@pytest.mark.parametrize("target", ["cpu", "rtx-sm86"])
def test_a_segmented_session_gives_what_the_whole_graph_gives(export: Export, target: str) -> None:
    inputs = export.captured.inputs(torch.arange(4), export.prompts).as_numpy()
    blocks = [name for name, _ in ADAPTER.blocks(export.quantized)]
    session = SegmentedSession(onnx.load(export.path(target)), blocks)
    expected = OnnxSession(export.path(target)).run(inputs)["sample"]
    first, second = (session.run(inputs)["sample"] for _ in range(2))
    assert np.array_equal(first, second)
    assert snr_db(expected, first) > 40


def test_a_large_graph_s_ranges_are_measured_in_segments(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = [export.captured.inputs(torch.arange(2), export.prompts).as_numpy()]
    blocks = [name for name, _ in ADAPTER.blocks(export.quantized)]
    target = TARGETS["rtx-sm75"]
    whole = measure_amax(export.path("exported"), target, feeds, blocks)
    monkeypatch.setattr(segments, "LARGEST_WHOLE", 0)
    in_segments = measure_amax(export.path("exported"), target, feeds, blocks)
    assert [(one.tensor, one.place) for one in in_segments] == [(one.tensor, one.place) for one in whole]
    assert [one.value for one in in_segments] == pytest.approx([one.value for one in whole], rel=1e-3)


def test_constants_are_computed_as_they_would_be_when_the_graph_runs(export: Export) -> None:
    model = onnx.load(export.path("exported"))
    computed = DividedGraph(model).part({}, ["sample"]).complete()
    assert not any(node.domain == "fp4export" for node in computed.graph.node)
    assert sum(len(tensor.raw_data) for tensor in computed.graph.initializer) > 4 * sum(
        len(tensor.raw_data) for tensor in model.graph.initializer if tensor.name.endswith(".words")
    )
    inputs = export.captured.inputs(torch.arange(2), export.prompts).as_numpy()
    one, other = (OnnxSession(graph).run(inputs)["sample"] for graph in (model, computed))
    assert np.array_equal(one, other)
