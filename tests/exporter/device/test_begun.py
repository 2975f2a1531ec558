"""Engines that are built beside other work: a real TensorRT-RTX builder, which needs no GPU."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import psutil
import pytest

from exporter.device import begun, requirements
from exporter.device.build import BuildOptions, build_engine, engine_begun
from exporter.device.profiles import BatchRange
from exporter.errors import EnvironmentLacksError
from exporter.progress import NullProgress
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


@needs_rtx
def test_what_was_begun_is_the_engine(tmp_path: Path) -> None:
    lowered, output = write_lowered(tmp_path, "rtx-sm89"), tmp_path / "out.plan"
    build_engine(lowered, output, TARGET, NullProgress())
    alone = output.read_bytes()
    output.unlink()
    with engine_begun(lowered, TARGET, tmp_path) as building:
        assert building is not None
        assert not output.exists()
        info = build_engine(lowered, output, TARGET, NullProgress(), begun=building)
    assert info.builder.startswith("TensorRT-RTX 1.")
    assert len(output.read_bytes()) == len(alone)
    assert {path.name for path in tmp_path.iterdir()} == {lowered.name, "out.plan"}


@needs_rtx
def test_the_other_work_comes_first(tmp_path: Path) -> None:
    with engine_begun(write_lowered(tmp_path, "rtx-sm89"), TARGET, tmp_path) as building:
        assert building is not None
        nice, end = psutil.Process().nice(), time.monotonic() + SECONDS
        while not any(builder.nice() > nice for builder in builders()):
            assert time.monotonic() < end, "no builder of lower priority"


@needs_rtx
def test_another_engine_is_not_taken_for_it(tmp_path: Path) -> None:
    lowered, output = write_lowered(tmp_path, "rtx-sm89"), tmp_path / "out.plan"
    options = BuildOptions(batch=BatchRange(1, 3, 7))
    build_engine(lowered, output, TARGET, NullProgress(), options)
    wanted = len(output.read_bytes())
    with engine_begun(lowered, TARGET, tmp_path) as building:
        build_engine(lowered, output, TARGET, NullProgress(), options, building)
    assert len(output.read_bytes()) == wanted


@needs_rtx
def test_leaving_ends_the_builder(tmp_path: Path) -> None:
    lowered = write_lowered(tmp_path, "rtx-sm89")

    def fail() -> None:
        with engine_begun(lowered, TARGET, tmp_path):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not builders()
    assert [path.name for path in tmp_path.iterdir()] == [lowered.name]


@pytest.mark.parametrize("target", ["cpu", "orin"])
def test_other_builders_are_not_begun(tmp_path: Path, target: str) -> None:
    with engine_begun(write_lowered(tmp_path, target), TARGETS[target], tmp_path) as building:
        assert building is None


def test_nothing_is_begun_where_memory_is_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = write_lowered(tmp_path, "rtx-sm89")
    monkeypatch.setattr(begun, "usable_memory", lambda: 10 * lowered.stat().st_size)
    with engine_begun(lowered, TARGET, tmp_path) as building:
        assert building is None


def test_what_refuses_it_is_said_when_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = write_lowered(tmp_path, "rtx-sm89")
    monkeypatch.setattr(requirements, "installed_version", lambda *, rtx: None)
    with engine_begun(lowered, TARGET, tmp_path) as building:
        assert building is None
        with pytest.raises(EnvironmentLacksError, match="pip install"):
            build_engine(lowered, tmp_path / "out.plan", TARGET, NullProgress(), begun=building)
