"""What is checked before an export takes long."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.cli import main
from exporter.source import activation_bytes


def test_a_block_of_pixart_needs_three_activations_and_the_captions() -> None:
    tokens, captions, width = 1024, 120, 1152
    assert activation_bytes(tokens * width, 0, captions * width) == 4 * (3 * tokens + captions) * width
    assert activation_bytes(tokens * width, 2, 0) == 4 * 7 * tokens * width


def test_activations_beyond_the_recipes_memory_are_announced_as_files(
    tiny_job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tiny_job / "tiny.yaml"), "-o", str(tmp_path / "x.onnx"), "--set", "calibration.memory=1e-5"]
    # Stops behind the announcement: the recipe has no labels.
    assert main([*command, "--set", "evaluation.classifier=missing.onnx"]) == 2
    assert "missing.onnx does not exist" in capsys.readouterr().err
    command += ["--set", "calibration.samples=10000000"]
    assert main(command) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert "calibration.samples: 10000000 trajectories need" in error
    assert "trajectories fit" not in error
    assert "at most" in error
    assert "--work-dir" in error
