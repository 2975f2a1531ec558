"""Probing: a graph's own outputs, and what its layers read and gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporter.errors import InputError
from exporter.onnx_input.probe import ProbePoint, run_probed
from tests.exporter.onnx_input.models import TOKENS, WIDTH, HandMade


def test_probing_sees_what_a_layer_reads_and_gives(tmp_path: Path) -> None:
    made = HandMade()
    hidden = made.node("Neg", "x", output="h")
    made.node("MatMul", hidden, made.random("w", WIDTH, 8), output="y")
    model = made.model("y")
    x = np.random.default_rng(0).standard_normal((2, TOKENS, WIDTH)).astype(np.float32)
    run = run_probed(model, [ProbePoint("fc", "h", "y", WIDTH, 8)], {"x": x}, tmp_path, "m")
    assert set(run.outputs) == {"y"}
    assert np.array_equal(run.layers["fc"].x, -x.reshape(-1, WIDTH))
    assert np.array_equal(run.layers["fc"].y, run.outputs["y"].reshape(-1, 8))
    assert run.layers["fc"].rank == 3
    assert list(tmp_path.iterdir()) == []


def test_models_that_fail_or_overflow_are_refused(tmp_path: Path) -> None:
    made = HandMade()
    model = made.model(made.node("Log", "x", output="y"))
    with pytest.raises(InputError, match="m: gives NaN or infinity at y on random inputs; --no-validate"):
        run_probed(model, [], {"x": -np.ones((2, TOKENS, WIDTH), np.float32)}, tmp_path, "m")
    with pytest.raises(InputError, match=r"m: on random inputs: .*'x' must be.*--no-validate"):
        run_probed(model, [], {"x": np.ones((2, TOKENS, 3), np.float32)}, tmp_path, "m")
