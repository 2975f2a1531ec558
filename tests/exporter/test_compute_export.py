"""FP16 and BF16 from the command line: engines are real, the gate sees the rounding, and what is wrong is caught."""

from __future__ import annotations

import importlib.util
import json
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
from exporter.metrics import read_metrics
from exporter.progress import NullProgress
from exporter.validate import RESULT, validate_output
from exporter.workdir import WorkDir

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed (extra: rtx)"
)
LAYER = "transformer_blocks.1.ff.net.2"
FAST = ["--set", "evaluation.trajectories=1", "--quiet"]
BOTH = pytest.mark.parametrize("compute", ["fp16", "bf16"])


@pytest.fixture(scope="module")
def engines(tiny_job: Path, begin: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Compute type → engine for rtx-sm89, each with a work folder of its own."""
    folder = tmp_path_factory.mktemp("compute")
    made = {compute: folder / f"{compute}.plan" for compute in ("fp16", "bf16")}
    for compute, engine in made.items():
        begin(_work(engine))
        command = [str(tiny_job / "tiny.yaml"), "-o", str(engine), "--target", "rtx-sm89", *FAST]
        assert main([*command, "--set", f"compute={compute}"]) == 0
    return made


def _work(engine: Path) -> Path:
    return engine.with_suffix(".work")


@needs_rtx
@pytest.mark.slow
@BOTH
def test_engine_metrics_report_and_gate_say_so(engines: dict[str, Path], compute: str) -> None:
    engine = engines[compute]
    check_rtx_engine(engine)
    metrics = read_metrics(engine.with_suffix(".metrics.json"))
    assert metrics["compute"]["type"] == compute
    assert (metrics["compute"]["largest_amax"] is None) == (compute == "bf16")
    assert f"{compute} outside them" in engine.with_suffix(".report.html").read_text()
    result = GateResult.from_json((_work(engine) / "gate.rtx-sm89" / RESULT).read_text())
    assert result.passed
    linears = [row for row in result.rows if row.kind == "linear"]
    assert len(linears) == 40
    assert all(row.threshold_db == 100 and row.code_mismatches == 0 for row in linears)
    assert any(note.startswith(f"{compute}: rounding alone moves") for note in result.notes)
    lowered = onnx.load(_work(engine) / "lowered.rtx-sm89.onnx")
    wanted = TensorProto.FLOAT16 if compute == "fp16" else TensorProto.BFLOAT16
    stored = {tensor.name: tensor.data_type for tensor in lowered.graph.initializer}
    assert stored["adaln_single.linear.weight"] == stored["pos_embed.pos_embed"] == wanted


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize(("compute", "target"), [("fp16", "rtx-sm86"), ("bf16", "rtx-sm86"), ("bf16", "rtx-sm120")])
def test_engines_for_other_gpus_are_built(
    engines: dict[str, Path], tiny_job: Path, tmp_path: Path, compute: str, target: str
) -> None:
    output, work = tmp_path / "x.plan", _work(engines[compute])
    command = [str(tiny_job / "tiny.yaml"), "-o", str(output), "--target", target, "--work-dir", str(work), *FAST]
    assert main([*command, "--no-validate", "--set", f"compute={compute}"]) == 0
    check_rtx_engine(output)


def _scale_off_by_one_percent(arrays: dict[str, np.ndarray]) -> str:
    arrays[f"{LAYER}.row_scales"] *= np.float32(1.01)
    return f"{LAYER}.row_scales"


def _scale_of_one_channel_off(arrays: dict[str, np.ndarray]) -> str:
    arrays[f"{LAYER}.row_scales"][9] *= np.float32(1.01)
    return f"{LAYER}.row_scales"


def _projection_off_by_one_percent(arrays: dict[str, np.ndarray]) -> str:
    name = next(name for name, array in arrays.items() if array.shape == (64, 6) and array.dtype == np.float32)
    arrays[name] *= np.float32(1.01)
    return name


def _modulation_that_overflows(arrays: dict[str, np.ndarray]) -> str:
    arrays["adaln_single.linear.bias"][:] = np.float32(70_000)
    return "adaln_single.linear.bias"


@needs_rtx
@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_scale_off_by_one_percent, f"linear {LAYER} "),
        (_scale_of_one_channel_off, f"linear {LAYER} .*output channel 9"),
        (_projection_off_by_one_percent, "tail sample"),
        (_modulation_that_overflows, "stem blocks.timestep"),
    ],
)
def test_what_is_wrong_is_caught(
    engines: dict[str, Path],
    tmp_path: Path,
    compute: str,
    change: Callable[[dict[str, np.ndarray]], str],
    named: str,
) -> None:
    work = Path(shutil.copytree(_work(engines[compute]), tmp_path / "work"))
    path = work / "emulated.rtx-sm89.onnx"
    model = onnx.load(path)
    arrays = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    name = change(arrays)
    next(t for t in model.graph.initializer if t.name == name).CopyFrom(numpy_helper.from_array(arrays[name], name))
    onnx.save(model, path)
    with pytest.raises(FidelityError, match=named):
        validate_output(path, work / "gate.rtx-sm89", path, NullProgress(), built_sha256="")


@pytest.mark.slow
def test_numbers_too_large_for_fp16_are_refused_with_their_place(
    tiny_job: Path, begin: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the model that was traced had had this bias."""
    (traced,) = begin(tmp_path / "x.work").glob("traced.*.onnx")
    model = onnx.load(traced)
    (bias,) = (one for one in model.graph.initializer if one.name == "transformer_blocks.0.attn1.to_out.0.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(64, 1e6, np.float32), bias.name))
    onnx.save(model, traced)
    key = json.loads(traced.with_name(f"{traced.name}.seal").read_text())["key"]
    WorkDir(traced.parent).seal(traced, key)
    command = [str(tiny_job / "tiny.yaml"), "-o", str(tmp_path / "x.plan"), "--target", "rtx-sm89", *FAST]
    assert main([*command, "--set", "compute=fp16"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "compute: fp16: transformer_blocks.0.attn1.to_out.0.output reaches 1e+06" in error
    assert "use `compute: bf16`" in error
    assert not (tmp_path / "x.plan").exists()
