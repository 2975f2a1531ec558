"""Real TensorRT-RTX engines of small graphs, built without a GPU, and every way a build can fail."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest

from exporter.device import child, requirements
from exporter.device.build import BuildOptions, build_engine, device_command
from exporter.device.child import WorkerError, run_worker
from exporter.device.jobs import EngineCheck, EngineJob, read_message
from exporter.device.profiles import BatchRange, profile_shapes
from exporter.device.rtx_file import check_rtx_engine
from exporter.errors import EnvironmentLacksError, InputError
from exporter.gpu import Gpu, local_gpu
from exporter.progress import NullProgress
from exporter.targets import TARGETS
from tests.exporter.device.lowered_graphs import write_lowered
from tests.exporter.passes.waist_graphs import WaistGraph, make_weight, one_linear


@dataclass
class Counted:
    """A task that may not be advanced past its end."""

    total: int

    def advance(self, steps: int = 1) -> None:
        self.total -= steps
        assert steps >= 0


needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed (extra: rtx)"
)


@needs_rtx
@pytest.mark.parametrize(
    ("target", "activation_format", "weight_format"),
    [
        ("rtx-sm86", "e2m3", "e2m1"),
        ("rtx-sm89", "ue2m4", "e2m1"),
        ("rtx-sm89", "e2m3", "e2m1"),
        ("rtx-sm120", "e2m3", "e2m1"),
        ("rtx-sm89", "e4m3", "e2m1"),
        ("rtx-sm120", "e4m3", "e4m3"),
        ("rtx-sm86", "none", "e1m2"),
    ],
)
def test_engine_is_real(tmp_path: Path, target: str, activation_format: str, weight_format: str) -> None:
    output = tmp_path / "out.plan"
    lowered = write_lowered(tmp_path, target, activation_format, weight_format)
    info = build_engine(lowered, output, TARGETS[target], NullProgress())
    check_rtx_engine(output)
    assert info.path == output
    assert info.size_bytes == output.stat().st_size > 10_000
    assert info.builder.startswith("TensorRT-RTX 1.")
    # The engine carries the source of its generated kernels: the quantizer's writes the container's bytes.
    byte_type = {"e2m3": b"__myln_int8*", "ue2m4": b"__myln_int8*", "e4m3": b"__myln_fp8_e4m3*", "none": b"*"}[
        activation_format
    ]
    assert byte_type + b" __restrict__" in output.read_bytes()
    assert f"accelerators={{{target.removeprefix('rtx-')} }}".encode() in output.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {f"lowered.{target}.onnx", "out.plan"}
    # No GPU here, or another one: nothing may look as if it had been checked.
    if local_gpu() is None:
        assert [check.state for check in info.checks] == ["not run"] * 3
        assert all("no GPU here" in check.detail for check in info.checks)


@needs_rtx
def test_the_builder_s_own_refusal_is_told(tmp_path: Path) -> None:
    """Past the preflight, which would refuse it first."""
    lowered = write_lowered(tmp_path, "rtx-sm89", "e4m3")
    shapes = profile_shapes(onnx.load(lowered), BatchRange())
    job = EngineJob(str(lowered), str(tmp_path / "out.plan"), True, (8, 6), shapes)
    with pytest.raises(WorkerError, match="fp8"):
        run_worker("build", job, "building", NullProgress())


@needs_rtx
def test_node_that_the_parser_refuses_is_named(tmp_path: Path) -> None:
    waist = WaistGraph()
    whole = waist.node("Cast", "x", output="whole", to=onnx.TensorProto.INT32)
    waist.node("Cast", waist.node("BitwiseNot", whole, output="not"), output="y", to=onnx.TensorProto.FLOAT)
    onnx.save(waist.model("y"), tmp_path / "m.onnx")
    job = EngineJob(str(tmp_path / "m.onnx"), str(tmp_path / "out.plan"), True, (8, 9), {})
    with pytest.raises(WorkerError, match=r"In node 1.*not_node.*BitwiseNot"):
        run_worker("build", job, "building", NullProgress())


@needs_rtx
def test_a_failed_build_leaves_the_older_engine(tmp_path: Path) -> None:
    lowered = write_lowered(tmp_path, "rtx-sm89")
    model = onnx.load(lowered)
    # A graph that passes the preflight and that the builder refuses: the weights' scales must be positive.
    scales = next(tensor for tensor in model.graph.initializer if tensor.name == "fc.row_scales")
    scales.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(scales), scales.name))
    onnx.save(model, lowered)
    output = tmp_path / "out.plan"
    output.write_bytes(b"an older engine")
    with pytest.raises(InputError, match=r"rtx-sm89 cannot be built: .*scale"):
        build_engine(lowered, output, TARGETS["rtx-sm89"], NullProgress())
    assert output.read_bytes() == b"an older engine"
    assert len(list(tmp_path.iterdir())) == 2


@needs_rtx
def test_phases_of_the_build_are_shown(tmp_path: Path) -> None:
    seen: list[str] = []

    class Recorder(NullProgress):
        @contextmanager
        def task(self, title: str, total: int) -> Iterator[Counted]:
            seen.append(title)
            yield Counted(total)

    build_engine(write_lowered(tmp_path, "rtx-sm89"), tmp_path / "out.plan", TARGETS["rtx-sm89"], Recorder())
    assert len(set(seen)) > 2
    assert all(title.startswith("building for rtx-sm89: ") for title in seen)


@needs_rtx
def test_another_batch_and_workspace_make_another_engine(tmp_path: Path) -> None:
    lowered = write_lowered(tmp_path, "rtx-sm89")
    options = BuildOptions(batch=BatchRange(1, 3, 7), workspace=1 << 24)
    plan = tmp_path / "out.plan"
    build_engine(lowered, plan, TARGETS["rtx-sm89"], NullProgress(), options)
    one = plan.read_bytes()
    build_engine(lowered, plan, TARGETS["rtx-sm89"], NullProgress())
    assert one != plan.read_bytes()


@needs_rtx
def test_output_folder_must_exist(tmp_path: Path) -> None:
    lowered = write_lowered(tmp_path, "rtx-sm89")
    with pytest.raises(InputError, match="folder does not exist"):
        build_engine(lowered, tmp_path / "no" / "out.plan", TARGETS["rtx-sm89"], NullProgress())


def test_lowered_graph_must_be_readable(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.onnx"):
        build_engine(tmp_path / "missing.onnx", tmp_path / "out.plan", TARGETS["rtx-sm89"], NullProgress())


def test_builder_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = write_lowered(tmp_path, "rtx-sm89")
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -ABRT $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(child.sys, "executable", str(killed))
    monkeypatch.setattr(requirements, "installed_version", lambda *, rtx: (1, 7))
    with pytest.raises(InputError, match="ended by signal 6"):
        build_engine(lowered, tmp_path / "out.plan", TARGETS["rtx-sm89"], NullProgress())
    assert not (tmp_path / "out.plan").exists()


def test_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = write_lowered(tmp_path, "rtx-sm89")
    monkeypatch.setattr(requirements, "installed_version", lambda *, rtx: None)
    with pytest.raises(EnvironmentLacksError, match=r"pip install tensorrt-rtx.*rtx-sm89\.onnx"):
        build_engine(lowered, tmp_path / "out.plan", TARGETS["rtx-sm89"], NullProgress())


@pytest.mark.parametrize(
    ("version", "gpu", "message"),
    [
        ((11, 4), None, r"no NVIDIA GPU here"),
        ((11, 4), Gpu("L4", (8, 9)), r"here L4 with compute capability 8\.9, not 9\.0; it can build for .*l4"),
        (None, Gpu("H100", (9, 0)), r"TensorRT is not installed here"),
        ((10, 2), Gpu("H100", (9, 0)), r"TensorRT 10\.2 is installed here, and target h100 needs 10\.3 or later"),
    ],
)
def test_device_build_elsewhere_says_what_to_run_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: tuple[int, int] | None,
    gpu: Gpu | None,
    message: str,
) -> None:
    lowered = write_lowered(tmp_path, "h100")
    monkeypatch.setattr(requirements, "installed_version", lambda *, rtx: version)
    monkeypatch.setattr(requirements, "local_gpu", lambda: gpu)
    with pytest.raises(EnvironmentLacksError, match=message) as caught:
        build_engine(lowered, tmp_path / "out.plan", TARGETS["h100"], NullProgress())
    assert f"ready: {lowered}" in str(caught.value)
    assert f"fp4export build {lowered} -o {tmp_path / 'out.plan'} --target h100" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    assert lowered.exists()


def test_profiles_and_the_device_s_command_range_over_batches() -> None:
    shapes = profile_shapes(one_linear(make_weight("fc")), BatchRange(1, 4, 8))
    assert shapes == {"x": ((1, 5, 64), (4, 5, 64), (8, 5, 64))}
    options = BuildOptions(batch=BatchRange(1, 4, 8))
    command = device_command(Path("a.onnx"), Path("a.plan"), TARGETS["orin"], options)
    assert command == "fp4export build a.onnx -o a.plan --target orin --batch 1:4:8"


def test_static_inputs_need_no_profile() -> None:
    waist = WaistGraph()
    model = waist.model(waist.node("Abs", "x", output="y"), x_shape=(2, 5))
    assert profile_shapes(model, BatchRange()) == {}


@pytest.mark.parametrize("text", ["", "1:2", "a", "1:2:3:4", "-1", "1:2:x", "1::2", "²"])
def test_a_batch_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"must be MIN:BEST:MAX"):
        BatchRange.parse(text)


def test_batches_are_parsed() -> None:
    assert BatchRange.parse("1:4:8") == BatchRange(1, 4, 8)
    assert BatchRange.parse("3") == BatchRange(3, 3, 3)


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


def test_jobs_survive_the_way_to_the_process() -> None:
    job = EngineJob("a.onnx", "b.plan", True, (8, 9), {"x": ((1, 5), (2, 5), (4, 5))}, workspace=1 << 30, kernels="k")
    assert EngineJob.from_json(job.to_json()) == job
    check = EngineCheck("a.plan", False, layers="l.json")
    assert EngineCheck.from_json(check.to_json()) == check


@pytest.mark.parametrize(
    "line", ["", "[TRT] [W] words", "fp4export:", "fp4export:{", "fp4export:[1]", 'fp4export:{"a": 1}']
)
def test_other_words_are_no_messages(line: str) -> None:
    assert read_message(line) is None
