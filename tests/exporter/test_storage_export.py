"""`storage` from the command line: what a dry run says, and engines whose weights stay at 4 bits."""

from __future__ import annotations

import importlib.util
import re
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

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra 'rtx'")
LAYER = "transformer_blocks.1.ff.net.2"


@pytest.mark.parametrize(
    ("target", "output", "default"), [("cpu", "x.onnx", "packed"), ("rtx-sm89", "x.plan", "container")]
)
def test_a_dry_run_says_what_it_takes(
    tiny_job: Path, capsys: pytest.CaptureFixture[str], target: str, output: str, default: str
) -> None:
    def said(storage: str) -> tuple[str, float]:
        command = [str(tiny_job / "tiny.yaml"), "-o", str(tiny_job / output), "--target", target, "--dry-run"]
        assert main([*command, "--set", f"storage={storage}"]) == 0
        text = capsys.readouterr().out
        return re.findall(r"^storage (\w+)$", text, re.M)[0], float(text.rpartition("expected (")[2].partition(")")[0])

    packed, container = said("packed"), said("container")
    assert (packed[0], container[0]) == ("packed", "container")
    assert packed[1] < container[1]
    assert said("auto") == {"packed": packed, "container": container}[default]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("storage=packed", "target rtx-sm75 takes `storage: container` only"),
        ("storage=int8", "unknown storage 'int8'; valid: auto, packed, container"),
    ],
)
def test_refusals(tiny_job: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str) -> None:
    command = [str(tiny_job / "tiny.yaml"), "-o", str(tiny_job / "x.plan"), "--target", "rtx-sm75"]
    assert main([*command, "--set", "compute=fp16", "--set", setting]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@needs_rtx
@pytest.mark.slow
def test_a_packed_engine_is_validated_and_a_changed_weight_is_seen(
    tiny_job: Path, begin: Callable[..., Path], tmp_path: Path
) -> None:
    engine, work = tmp_path / "packed.plan", tmp_path / "packed.work"
    begin(work)
    command = [str(tiny_job / "tiny.yaml"), "-o", str(engine), "--target", "rtx-sm89", "--quiet"]
    assert main([*command, "--set", "storage=packed", "--set", "evaluation.trajectories=1"]) == 0
    check_rtx_engine(engine)
    result = GateResult.from_json((work / "gate.rtx-sm89" / RESULT).read_text())
    assert result.passed
    linears = [row for row in result.rows if row.kind == "linear"]
    assert len(linears) == 40
    assert all(row.code_mismatches == 0 for row in linears)
    lowered = onnx.load(work / "lowered.rtx-sm89.onnx")
    ranks = {tensor.name: tensor for tensor in lowered.graph.initializer if tensor.data_type == TensorProto.INT4}
    assert len(ranks) == 20
    changed = numpy_helper.to_array(ranks[f"{LAYER}.ranks"]).astype(np.int8)
    changed[0, 0] = 7 if changed[0, 0] < 0 else -7
    nibbles = changed.astype(np.uint8).ravel() & 15
    ranks[f"{LAYER}.ranks"].raw_data = (nibbles[::2] | nibbles[1::2] << 4).tobytes()
    path = work / "lowered.rtx-sm89.onnx"
    onnx.save(lowered, path)
    with pytest.raises(FidelityError, match=f"linear {LAYER} "):
        validate_output(path, work / "gate.rtx-sm89", path, NullProgress(), built_sha256="")
