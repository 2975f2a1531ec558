"""Real TensorRT-RTX engines of small graphs, built without a GPU, and every way a build can fail."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from exporter import build
from exporter.build import BatchRange, build_engine, check_rtx_engine, device_command, profile_shapes
from exporter.engine_worker import EngineJob
from exporter.errors import EnvironmentLacksError, InputError
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.progress import NullProgress
from exporter.targets import TARGETS, Gpu
from tests.exporter.passes.waist_graphs import WaistGraph, make_weight, one_linear

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed (extra: rtx)"
)


def _lowered(folder: Path, target: str, activation_format: str = "e2m3", weight_format: str = "e2m1") -> Path:
    kind = {"none": "group", "e4m3": "channel"}.get(activation_format, "foldable")
    weight = make_weight("fc", weight_format, 0 if kind == "channel" else 32, kind, features=32)
    passes = (*WAIST_PASSES, *lowering_passes(TARGETS[target]))
    model, _ = run_passes(one_linear(weight, activation_format), passes, TARGETS[target])
    path = folder / f"{target}.onnx"
    onnx.save(model, path)
    return path


@needs_rtx
@pytest.mark.parametrize(
    ("target", "activation_format", "weight_format"),
    [
        ("rtx-sm86", "e2m3", "e2m1"),
        ("rtx-sm89", "e2m3", "e2m1"),
        ("rtx-sm120", "e2m3", "e2m1"),
        ("rtx-sm89", "e4m3", "e2m1"),
        ("rtx-sm120", "e4m3", "e4m3"),
        ("rtx-sm86", "none", "e1m2"),
    ],
)
def test_engine_is_real(tmp_path: Path, target: str, activation_format: str, weight_format: str) -> None:
    output = tmp_path / "out.plan"
    lowered = _lowered(tmp_path, target, activation_format, weight_format)
    info = build_engine(lowered, output, TARGETS[target], NullProgress())
    check_rtx_engine(output)
    assert info.path == output
    assert info.size_bytes == output.stat().st_size > 10_000
    assert info.builder.startswith("TensorRT-RTX 1.")
    # The engine carries the source of its generated kernels: the quantizer's writes the container's bytes.
    byte_type = {"e2m3": b"__myln_int8*", "e4m3": b"__myln_fp8_e4m3*", "none": b"*"}[activation_format]
    assert byte_type + b" __restrict__" in output.read_bytes()
    assert f"accelerators={{{target.removeprefix('rtx-')} }}".encode() in output.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {f"{target}.onnx", "out.plan"}


@needs_rtx
def test_fp8_graph_is_not_built_for_a_gpu_without_fp8(tmp_path: Path) -> None:
    lowered = _lowered(tmp_path, "rtx-sm89", "e4m3")
    output = tmp_path / "out.plan"
    output.write_bytes(b"an older engine")
    with pytest.raises(InputError, match=r"rtx-sm86 cannot be built.*fp8"):
        build_engine(lowered, output, TARGETS["rtx-sm86"], NullProgress())
    assert output.read_bytes() == b"an older engine"
    assert len(list(tmp_path.iterdir())) == 2


@needs_rtx
def test_node_that_the_parser_refuses_is_named(tmp_path: Path) -> None:
    waist = WaistGraph()
    whole = waist.node("Cast", "x", output="whole", to=onnx.TensorProto.INT32)
    waist.node("Cast", waist.node("BitwiseNot", whole, output="not"), output="y", to=onnx.TensorProto.FLOAT)
    onnx.save(waist.model("y"), tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"m\.onnx: target rtx-sm89 cannot be built: In node 1.*not_node.*BitwiseNot"):
        build_engine(tmp_path / "m.onnx", tmp_path / "out.plan", TARGETS["rtx-sm89"], NullProgress())


@needs_rtx
def test_output_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder does not exist"):
        build_engine(_lowered(tmp_path, "rtx-sm89"), tmp_path / "no" / "out.plan", TARGETS["rtx-sm89"], NullProgress())


def test_lowered_graph_must_be_readable(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.onnx"):
        build_engine(tmp_path / "missing.onnx", tmp_path / "out.plan", TARGETS["rtx-sm89"], NullProgress())


def test_builder_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = _lowered(tmp_path, "rtx-sm89")
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -ABRT $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(build.sys, "executable", str(killed))
    with pytest.raises(InputError, match="ended by signal 6"):
        build_engine(lowered, tmp_path / "out.plan", TARGETS["rtx-sm89"], NullProgress())
    assert not (tmp_path / "out.plan").exists()


def test_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = _lowered(tmp_path, "rtx-sm89")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentLacksError, match=r"fp4export\[rtx\].*rtx-sm89\.onnx"):
        build_engine(lowered, tmp_path / "out.plan", TARGETS["rtx-sm89"], NullProgress())


@pytest.mark.parametrize(
    ("installed", "gpu", "message"),
    [
        (False, None, r"TensorRT is not installed here"),
        (True, None, r"no NVIDIA GPU here"),
        (True, Gpu("L4", (8, 9)), r"here L4 with compute capability 8\.9, not 9\.0"),
    ],
)
def test_device_build_elsewhere_says_what_to_run_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, gpu: Gpu | None, message: str
) -> None:
    lowered = _lowered(tmp_path, "h100")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(build, "local_gpu", lambda: gpu)
    with pytest.raises(EnvironmentLacksError, match=message) as caught:
        build_engine(lowered, tmp_path / "out.plan", TARGETS["h100"], NullProgress())
    assert f"ready: {lowered}" in str(caught.value)
    assert f"trtexec --onnx={lowered} --stronglyTyped --saveEngine={tmp_path / 'out.plan'}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    assert lowered.exists()


def test_device_command_ranges_over_batches() -> None:
    shapes = profile_shapes(one_linear(make_weight("fc")), BatchRange(1, 4, 8))
    assert shapes == {"x": ((1, 5, 64), (4, 5, 64), (8, 5, 64))}
    command = device_command(Path("a.onnx"), Path("a.plan"), shapes)
    assert command.endswith("--minShapes=x:1x5x64 --optShapes=x:4x5x64 --maxShapes=x:8x5x64")


def test_static_inputs_need_no_profile() -> None:
    waist = WaistGraph()
    model = waist.model(waist.node("Abs", "x", output="y"), x_shape=(2, 5))
    assert profile_shapes(model, BatchRange()) == {}
    assert "Shapes" not in device_command(Path("a.onnx"), Path("a.plan"), {})


@pytest.mark.parametrize("sizes", [(0, 1, 2), (2, 1, 4), (1, 8, 4)])
def test_batch_range_must_ascend(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="batch sizes"):
        BatchRange(*sizes)


def test_damaged_engines_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.plan"
    whole = b"vtrt" + bytes(4) + (2).to_bytes(8, "little") + (64).to_bytes(8, "little") + bytes(40)
    path.write_bytes(whole)
    check_rtx_engine(path)
    for content, message in [
        (whole[:-1], "63 of 64 bytes"),
        (b"onnx" + whole[4:], "not a Tensor"),
        (b"", "not a Tensor"),
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            check_rtx_engine(path)


def test_job_survives_the_way_to_the_process() -> None:
    job = EngineJob("a.onnx", "b.plan", True, (8, 9), {"x": ((1, 5), (2, 5), (4, 5))})
    assert EngineJob.from_json(job.to_json()) == job
    other = EngineJob("a.onnx", "b.plan", False, None, {})
    assert EngineJob.from_json(json.dumps(json.loads(other.to_json()))) == other


def test_importing_the_builder_loads_no_tensorrt() -> None:
    code = (
        "import sys, exporter.build; print([m for m in sys.modules if 'tensorrt' in m or m.startswith('polygraphy')])"
    )
    root = str(Path(build.__file__).parents[1])
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert answer.stdout.strip() == "[]"
