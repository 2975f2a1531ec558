"""Engines that are built beside other work: a real TensorRT-RTX builder, which needs no GPU."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import psutil
import pytest
from onnx import numpy_helper

from exporter.device import begun, build, requirements
from exporter.device.build import BuildOptions, build_engine, engine_begun
from exporter.device.child import run_worker
from exporter.device.jobs import EngineJob, Stage
from exporter.device.profiles import BatchRange
from exporter.device.rtx_file import check_rtx_engine
from exporter.errors import EnvironmentLacksError
from exporter.progress import NullProgress, Progress
from exporter.targets import TARGETS
from tests.exporter.device.lowered_graphs import write_lowered

TARGET = TARGETS["rtx-sm89"]
SECONDS = 60
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed (extra: rtx)"
)


def builders() -> list[psutil.Process]:
    """The builders that run as this process's children."""
    return [child for child in psutil.Process().children() if "exporter.device.worker" in child.cmdline()]


def running_builders() -> list[psutil.Process]:
    """The same, as soon as there are any."""
    end = time.monotonic() + SECONDS
    while not builders():
        assert time.monotonic() < end, "no builder was begun"
    return builders()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[EngineJob]:
    """The jobs that are built by `build_engine` itself."""
    jobs: list[EngineJob] = []

    def counted(stage: Stage, job: EngineJob, title: str, progress: Progress) -> dict[str, Any]:
        jobs.append(job)
        return run_worker(stage, job, title, progress)

    monkeypatch.setattr(build, "run_worker", counted)
    return jobs


@needs_rtx
def test_what_was_begun_is_the_engine(tmp_path: Path, alone: list[EngineJob]) -> None:
    lowered, output = write_lowered(tmp_path, "rtx-sm89"), tmp_path / "out.plan"
    with engine_begun(lowered, TARGET, tmp_path) as building:
        assert building is not None
        assert not output.exists()
        info = build_engine(lowered, output, TARGET, NullProgress(), begun=building)
    assert not alone
    assert info.builder.startswith("TensorRT-RTX 1.")
    check_rtx_engine(output)
    assert {path.name for path in tmp_path.iterdir()} == {lowered.name, "out.plan"}


@needs_rtx
def test_the_other_work_comes_first(tmp_path: Path) -> None:
    with engine_begun(write_lowered(tmp_path, "rtx-sm89"), TARGET, tmp_path):
        (builder,) = running_builders()
        end = time.monotonic() + SECONDS
        while builder.nice() != min(psutil.Process().nice() + 5, 19):
            assert time.monotonic() < end, "the builder has the priority of the export"


@needs_rtx
def test_another_engine_is_not_taken_for_it(tmp_path: Path, alone: list[EngineJob]) -> None:
    lowered, output = write_lowered(tmp_path, "rtx-sm89"), tmp_path / "out.plan"
    options = BuildOptions(batch=BatchRange(1, 3, 7))
    with engine_begun(lowered, TARGET, tmp_path) as building:
        build_engine(lowered, output, TARGET, NullProgress(), options, building)
    (job,) = alone
    assert {most[0] for _, _, most in job.shapes.values()} == {7}


@needs_rtx
def test_what_fails_beside_the_gate_is_built_alone(tmp_path: Path, alone: list[EngineJob]) -> None:
    lowered, output = write_lowered(tmp_path, "rtx-sm89"), tmp_path / "out.plan"
    with engine_begun(lowered, TARGET, tmp_path) as building:
        running_builders()[0].kill()
        build_engine(lowered, output, TARGET, NullProgress(), begun=building)
    assert len(alone) == 1
    check_rtx_engine(output)


def test_leaving_ends_the_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that would take far longer than this test may."""
    sleeping = [sys.executable, "-c", f"import time; time.sleep({10 * SECONDS}) # exporter.device.worker"]
    ended: list[int | None] = []

    def sleep(_stage: Stage, _job: EngineJob, _title: str, _progress: Progress, started: Any) -> None:
        with subprocess.Popen(sleeping, text=True) as process:
            started(process)
            ended.append(process.wait())

    monkeypatch.setattr(begun, "run_worker", sleep)
    job = EngineJob("lowered.onnx", "engine.plan", True, (8, 9), {})
    for wait in (True, False):
        with begun.BegunEngine(job) as building:
            end = time.monotonic() + SECONDS
            while wait and building._process is None:
                assert time.monotonic() < end
    assert ended == [-signal.SIGKILL] * 2


@needs_rtx
def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    lowered = write_lowered(tmp_path, "rtx-sm89")

    def interrupted() -> None:
        with engine_begun(lowered, TARGET, tmp_path):
            running_builders()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not builders()
    assert [path.name for path in tmp_path.iterdir()] == [lowered.name]


@pytest.mark.parametrize("target", ["cpu", "orin"])
def test_other_builders_are_not_begun(tmp_path: Path, target: str) -> None:
    with engine_begun(write_lowered(tmp_path, target), TARGETS[target], tmp_path) as building:
        assert building is None


@needs_rtx
def test_nothing_is_begun_where_memory_is_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = write_lowered(tmp_path, "rtx-sm89")
    weights = sum(numpy_helper.to_array(tensor).size for tensor in onnx.load(lowered).graph.initializer)
    monkeypatch.setattr(begun, "usable_memory", lambda: 10 * weights)
    with engine_begun(lowered, TARGET, tmp_path) as building:
        assert building is None
    monkeypatch.setattr(begun, "usable_memory", lambda: 11 * weights)
    with engine_begun(lowered, TARGET, tmp_path) as building:
        assert building is not None


def test_what_refuses_it_is_said_when_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = write_lowered(tmp_path, "rtx-sm89")
    monkeypatch.setattr(requirements, "installed_version", lambda *, rtx: None)
    with engine_begun(lowered, TARGET, tmp_path) as building:
        assert building is None
        with pytest.raises(EnvironmentLacksError, match="pip install"):
            build_engine(lowered, tmp_path / "out.plan", TARGET, NullProgress(), begun=building)
