"""Sabotaged copies of a finished export, each with the origin that leads to its reference."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from exporter.onnx_files import save_onnx
from exporter.origin import origin_path

Sabotage = Callable[[onnx.ModelProto], None]


@pytest.fixture
def sabotaged(tiny_export: Path, tmp_path: Path) -> Callable[[Sabotage], Path]:
    """Make a copy of the CPU file that `change` was done to."""

    def make(change: Sabotage) -> Path:
        model = onnx.load(tiny_export)
        change(model)
        output = tmp_path / "sabotaged.onnx"
        save_onnx(model, output)
        shutil.copy(origin_path(tiny_export), origin_path(output))
        return output

    return make
