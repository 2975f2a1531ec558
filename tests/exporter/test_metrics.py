"""The metrics file is valid by its schema, whatever was skipped, and nothing else passes as one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from exporter.errors import InputError
from exporter.gate.table import GateResult, GateRow
from exporter.metrics import (
    Fidelity,
    LayerContainer,
    LayerFormat,
    Metrics,
    Quality,
    Size,
    check_metrics,
    installed_versions,
    metrics_schema,
    read_metrics,
    write_metrics,
)
from exporter.plan import LayerPlan

LAYER = LayerPlan("blocks.0.to_q", 256, 128, True, "e2m1", "e2m3", 32, "foldable", "int8")
GATE = GateResult(
    (
        GateRow("lowered", "linear", "a", 200.0, 100.0, passed=True, code_mismatches=1, explained=1, code_count=4),
        GateRow("lowered", "block", "b", 60.0, 50.0, passed=True),
        GateRow("lowered", "tail", "sample", 55.0, 50.0, passed=True),
        GateRow("lowered", "end_to_end", "sample", 45.0, 40.0, passed=True),
    )
)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(
        target="cpu",
        size=Size(1000, 200),
        fidelity=Fidelity.of(GATE, 30.0),
        quality=Quality(27.0, 20.0, 0.99, 0.98),
        seconds={"load": 0.123456, "calibrate": 100.0},
        versions=installed_versions(),
        layers=(
            LayerContainer.of(LAYER),
            LayerContainer.of(replace(LAYER, activation_format="none", container="fp32")),
            LayerContainer.of(replace(LAYER, activation_format="e2m1", group_size=16, scales="nvfp4", container="fp4")),
        ),
        formats=(LayerFormat("a", "e1m2", {"e2m1": 30.0, "e1m2": 31.0}, {"e3m0": "fp32 instead of int8"}),),
    )


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(metrics_schema())


def test_written_and_read(metrics: Metrics, tmp_path: Path) -> None:
    write_metrics(tmp_path / "a.metrics.json", metrics)
    document = read_metrics(tmp_path / "a.metrics.json")
    assert document["size"] == {"fp32_bytes": 1000, "output_bytes": 200}
    assert document["fidelity"] == {
        "passed": True,
        "linear_min_snr_db": 200.0,
        "block_min_snr_db": 55.0,
        "code_mismatch_fraction": 0.25,
        "end_to_end_snr_db": 45.0,
        "quantization_snr_db": 30.0,
    }
    assert document["quality"]["class_accuracy_quantized"] == 0.98
    assert document["seconds"] == {"load": 0.123, "calibrate": 100.0}
    assert {"python", "torch", "onnx", "onnxruntime"} <= document["versions"].keys()
    assert metrics.size.ratio == 0.2
    assert document["formats"] == [
        {
            "layer": "a",
            "chosen": "e1m2",
            "snr_db": {"e2m1": 30.0, "e1m2": 31.0},
            "refused": {"e3m0": "fp32 instead of int8"},
        }
    ]
    integers, floats, blocks = document["layers"]
    assert blocks == {
        "layer": "blocks.0.to_q",
        "container": "fp4",
        "exact": None,
        "accumulator_bound": None,
        "accumulator_limit": None,
        "reason": None,
    }
    assert integers == {
        "layer": "blocks.0.to_q",
        "container": "int8",
        "exact": True,
        "accumulator_bound": 12 * 10 * 60 * 128,
        "accumulator_limit": 2**31 - 1,
        "reason": "sums of 128 products stay within 921600 ≤ 2147483647",
    }
    assert (floats["exact"], floats["accumulator_bound"]) == (False, None)


def test_skipped_parts_are_null(metrics: Metrics) -> None:
    document = json.loads(replace(metrics, fidelity=None, quality=None).to_json())
    assert document["fidelity"] is None
    assert document["quality"] is None
    without = json.loads(replace(metrics, quality=Quality(27.0, 20.0)).to_json())
    assert without["quality"]["class_accuracy_fp"] is None


@pytest.mark.parametrize("snr", [math.inf, -math.inf, math.nan])
def test_a_figure_that_json_lacks_is_bounded_by_the_gate(snr: float) -> None:
    fidelity = Fidelity.of(GATE, snr)
    assert abs(fidelity.quantization_snr_db) == 200


def test_a_gate_without_rows_of_a_kind_reports_the_lower_bound() -> None:
    assert Fidelity.of(GateResult(GATE.rows[:1]), 30.0).end_to_end_snr_db == -200


def test_impossible_figures_are_not_written(metrics: Metrics, tmp_path: Path) -> None:
    path = tmp_path / "a.metrics.json"
    for broken in (
        replace(metrics, quality=Quality(math.inf, 20.0)),
        replace(metrics, quality=Quality(20.0, 20.0, 1.5)),
        replace(metrics, size=Size(0, 1)),
        replace(metrics, seconds={"load": -1.0}),
    ):
        with pytest.raises(jsonschema.ValidationError):
            write_metrics(path, broken)
    assert not path.exists()


def test_unknown_and_missing_keys_are_invalid(metrics: Metrics) -> None:
    document = json.loads(metrics.to_json())
    with pytest.raises(jsonschema.ValidationError, match="bogus"):
        check_metrics(document | {"bogus": 1})
    del document["size"]["output_bytes"]
    with pytest.raises(jsonschema.ValidationError, match="output_bytes"):
        check_metrics(document)


@pytest.mark.parametrize(("content", "named"), [(None, "cannot be read"), ("{", "cannot be read"), ("{}", "required")])
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: str | None, named: str) -> None:
    path = tmp_path / "a.metrics.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=named):
        read_metrics(path)
