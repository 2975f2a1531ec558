"""Models that are too large to compare here."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.errors import EnvironmentLacksError
from exporter.onnx_input import job
from exporter.onnx_input.job import quantize_onnx
from exporter.onnx_input.room import refuse_without_room
from exporter.onnx_input.selection import FormatOptions
from tests.exporter.onnx_input.models import matmul_and_add, save
from tests.exporter.test_plan import planned

LAYERS = planned(preset="w4a6").layers
NEEDED = 8 * sum(layer.fp32_bytes for layer in LAYERS)


def test_a_model_that_does_not_fit_is_refused_with_a_way_out() -> None:
    refuse_without_room(Path("m.onnx"), LAYERS, NEEDED)
    with pytest.raises(EnvironmentLacksError, match=r"m\.onnx: comparing .* takes about .* --no-validate"):
        refuse_without_room(Path("m.onnx"), LAYERS, NEEDED - 1)


def test_it_is_asked_before_any_work_and_not_without_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = save(matmul_and_add(), tmp_path / "m.onnx"), tmp_path / "out.onnx"
    monkeypatch.setattr(job, "usable_memory", lambda: 0)
    options = FormatOptions("e2m1", activation="none", scales="channel")
    with pytest.raises(EnvironmentLacksError, match="comparing a model of this size"):
        quantize_onnx(source, output, options)
    assert not output.exists()
    quantize_onnx(source, output, options, validate=False)
    assert output.is_file()
