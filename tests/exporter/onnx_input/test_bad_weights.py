"""Weights that no scale can quantize."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper

from exporter.errors import InputError
from exporter.onnx_input.job import quantize_onnx
from exporter.onnx_input.selection import FormatOptions
from tests.exporter.onnx_input.models import matmul_and_add, save


def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    model = matmul_and_add("blocks.0.fc")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("weight"))
    array = numpy_helper.to_array(weight).copy()
    array[3, 4] = np.nan
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    options = FormatOptions("e2m1", activation="none", scales="channel")
    with pytest.raises(InputError, match=r"blocks\.0\.fc: its weight holds NaN or infinity"):
        quantize_onnx(save(model, tmp_path / "model.onnx"), tmp_path / "out.onnx", options)
