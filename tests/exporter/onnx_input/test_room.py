"""Models that are too large to compare here."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.errors import EnvironmentLacksError
from exporter.onnx_input import room
from exporter.onnx_input.room import refuse_without_room
from tests.exporter.test_plan import planned

LAYERS = planned(preset="w4a6").layers
WEIGHTS = sum(layer.fp32_bytes for layer in LAYERS)


def test_a_model_that_does_not_fit_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "usable_memory", lambda: 7 * WEIGHTS)
    refuse_without_room(Path("m.onnx"), LAYERS)
    monkeypatch.setattr(room, "usable_memory", lambda: 7 * WEIGHTS - 1)
    with pytest.raises(EnvironmentLacksError, match=r"m\.onnx: comparing .* takes about .* --no-validate"):
        refuse_without_room(Path("m.onnx"), LAYERS)
