"""Turing from the command line: real engines with FP16 products, judged by their rounding; what is wrong is caught."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from exporter.cli import main
from exporter.device.rtx_file import check_rtx_engine
from exporter.errors import FidelityError
from exporter.gate.table import GateResult
from exporter.progress import NullProgress
from exporter.validate import RESULT, validate_output
from tests.exporter.conftest import preset_settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed (extra: rtx)"
    ),
]
LAYER = "transformer_blocks.1.ff.net.2"
STAGES = ("exported", "lowered")
PRESETS = ("w4a6", "w4a8_int", "w4a16")
FAST = ["--set", "evaluation.trajectories=1", "--set", "compute=fp16", "--quiet"]


@pytest.fixture(scope="module")
def work(tiny_job: Path, begin: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a work folder of each preset."""
    folder = tmp_path_factory.mktemp("turing")
    for preset in PRESETS:
        # The tiny recipe's own preset is the first.
        settings = [] if preset == PRESETS[0] else preset_settings(preset)
        begin(folder / f"{preset}.work", *([preset] if settings else []))
        command = [str(tiny_job / "tiny.yaml"), "-o", str(folder / f"{preset}.plan"), "--target", "rtx-sm75", *FAST]
        assert main([*command, *settings]) == 0
    return folder


@pytest.mark.parametrize("preset", PRESETS)
def test_the_engine_is_built_and_held_to_the_rounding_of_its_products(work: Path, preset: str) -> None:
    check_rtx_engine(work / f"{preset}.plan")
    result = GateResult.from_json((work / f"{preset}.work" / "gate.rtx-sm75" / RESULT).read_text())
    assert result.passed
    linears = {stage: [row for row in result.rows if (row.kind, row.stage) == ("linear", stage)] for stage in STAGES}
    assert [len(rows) for rows in linears.values()] == [20, 20]
    assert all(row.threshold_db == 100 for row in linears["exported"])
    # Rounding leaves about 73 dB of a product, at least 66; the bias moves both.
    assert all(63 < row.threshold_db < 75 for row in linears["lowered"])
    assert all(row.threshold_db + 3 < row.snr_db < row.threshold_db + 12 for row in linears["lowered"])
    assert all(row.code_mismatches == 0 for row in linears["lowered"])
    assert any("whose products are rounded to fp16" in note for note in result.notes)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_product_is_left_in_fp32(work: Path, preset: str) -> None:
    lowered = onnx.load(work / f"{preset}.work" / "lowered.rtx-sm75.onnx")
    types = {info.name: info.type.tensor_type.elem_type for info in lowered.graph.value_info}
    products = [node.output[0] for node in lowered.graph.node if node.op_type in ("MatMul", "Gemm")]
    assert len(products) > 20
    assert {types[name] for name in products} == {TensorProto.FLOAT16}


def _all_rows(array: np.ndarray) -> None:
    array *= array.dtype.type(1.01)


def _one_row(array: np.ndarray) -> None:
    array[9] *= array.dtype.type(1.01)


def _another_power(array: np.ndarray) -> None:
    array[9] *= array.dtype.type(2)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("constant", "change", "named"),
    [
        ("outside", _all_rows, f"linear {LAYER} "),
        ("outside", _one_row, f"linear {LAYER} .*output channel 9"),
        ("inside", _another_power, f"linear {LAYER} .*output channel 9"),
    ],
)
def test_a_wrong_scale_is_caught(
    work: Path, tmp_path: Path, preset: str, constant: str, change: Callable[[np.ndarray], None], named: str
) -> None:
    copy = Path(shutil.copytree(work / f"{preset}.work", tmp_path / "work"))
    path, name = copy / "emulated.rtx-sm75.onnx", f"{LAYER}.row_scales.{constant}"
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    array = numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, path)
    with pytest.raises(FidelityError, match=named):
        validate_output(path, copy / "gate.rtx-sm75", path, NullProgress(), built_sha256="")
