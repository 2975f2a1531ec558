"""The one place that knows TensorRT's versions.

The core library is absent here, so a fake stands for it; TensorRT-RTX's real builder goes through the same code in
test_build.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.device import tensorrt_api
from exporter.device.jobs import EngineJob
from exporter.device.tensorrt_api import BuildError, build_engine, load_engine
from exporter.device.versions import version_of
from plugins.kernels.library import KernelLibrary
from tests.exporter.device.fake_tensorrt import Flags12, fake_tensorrt
from tests.exporter.device.lowered_graphs import write_library

QUANTIZER = "TokenQuantize_e2m3_int8_fp16_k64"


@pytest.fixture
def job(tmp_path: Path) -> EngineJob:
    shapes = {"x": ((1, 5), (2, 5), (4, 5))}
    cache = str(tmp_path / "new.cache")
    return EngineJob("m.onnx", str(tmp_path / "e.plan"), False, (8, 7), shapes, new_timing_cache=cache)


def _build(trt: Any, job: EngineJob) -> tuple[str, list[tuple[str, dict[str, object]]]]:
    messages: list[tuple[str, dict[str, object]]] = []
    return build_engine(trt, job, lambda kind, **facts: messages.append((kind, facts))), messages


def test_the_network_is_strongly_typed_and_ranges_over_the_profile(job: EngineJob) -> None:
    trt = fake_tensorrt()
    state, messages = _build(trt, replace(job, workspace=1 << 20))
    assert (state, trt.told.parsed, trt.told.flags) == ("new", "m.onnx", 1 << 1)
    assert trt.told.config.profiles == [job.shapes]
    assert trt.told.config.limits == {"workspace": 1 << 20}
    assert trt.told.config.profiling_verbosity == "detailed"
    assert not hasattr(trt.told.config, "num_compute_capabilities")
    assert Path(job.engine).read_bytes() == b"engine"
    assert messages == [
        ("start", {"phase": "Building", "steps": 2}),
        ("step", {"phase": "Building", "done": 1}),
        ("finish", {"phase": "Building"}),
    ]


def test_a_release_without_the_flag_is_strongly_typed_anyway(job: EngineJob) -> None:
    trt = fake_tensorrt(Flags12)
    _build(trt, job)
    assert trt.told.flags == 0
    assert trt.told.config.limits == {}


@pytest.mark.parametrize(
    ("content", "state", "kept"),
    [(None, "new", b"gpu+"), (b"gpu1", "used", b"gpu1+"), (b"other", "of another version or GPU", b"gpu+")],
)
def test_a_timing_cache_is_used_unless_tensorrt_says_it_is_another_s(
    job: EngineJob, tmp_path: Path, content: bytes | None, state: str, kept: bytes
) -> None:
    if content is not None:
        (tmp_path / "old.cache").write_bytes(content)
        job = replace(job, timing_cache=str(tmp_path / "old.cache"))
    assert _build(fake_tensorrt(), job)[0] == state
    assert (tmp_path / "new.cache").read_bytes() == kept


def test_without_a_timing_cache_none_is_written(job: EngineJob, tmp_path: Path) -> None:
    assert _build(fake_tensorrt(), replace(job, new_timing_cache=None))[0] == "off"
    assert [file.name for file in tmp_path.iterdir()] == ["e.plan"]


def test_what_the_parser_and_the_builder_refuse_is_told(job: EngineJob) -> None:
    with pytest.raises(BuildError, match="In node 7 with name 'late' and operator Swish: no importer"):
        _build(fake_tensorrt(), replace(job, onnx="refused.onnx"))
    with pytest.raises(BuildError, match="made no engine"):
        _build(fake_tensorrt(engine=None), job)


def test_plugins_are_registered_before_the_graph_is_parsed(
    job: EngineJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt, calls = fake_tensorrt(), []

    def register(op_types: tuple[str, ...], library: KernelLibrary, capability: tuple[int, int]) -> None:
        assert trt.told.parsed is None
        calls.append((op_types, library.kernels[0].entry, capability))

    monkeypatch.setattr(tensorrt_api, "register", register)
    _build(trt, replace(job, plugins=("Scale_k64",), kernels=str(write_library(tmp_path / "m.kernels"))))
    assert calls == [(("Scale_k64",), "scale_k64_sm87_t0", (8, 7))]
    assert trt.told.flags == 1 << 1 | 1 << 2
    with pytest.raises(BuildError, match="copy the folder of kernels along"):
        _build(trt, replace(job, plugins=("Scale_k64",), kernels=str(tmp_path / "none")))


def test_plugins_are_in_tensorrt_s_own_registry_when_the_graph_is_parsed(
    job: EngineJob, tmp_path: Path, in_tensorrt: Callable[..., Any]
) -> None:
    kernels = str(write_library(tmp_path / "m.kernels", QUANTIZER))
    job = replace(job, plugins=(QUANTIZER,), kernels=kernels, new_timing_cache=None)
    assert in_tensorrt({"engine": job.to_json()}) == [QUANTIZER]
    assert Path(job.engine).read_bytes() == b"engine"


def test_an_engine_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    trt = fake_tensorrt()
    trt.Runtime = lambda _logger: type("Runtime", (), {"deserialize_cuda_engine": lambda self, content: None})()
    (tmp_path / "e.plan").write_bytes(b"x")
    with pytest.raises(BuildError, match="cannot deserialize"):
        load_engine(trt, tmp_path / "e.plan")


@pytest.mark.parametrize(
    ("text", "version"),
    [("10.3.0.26", (10, 3)), ("11.4", (11, 4)), ("1.7.1.116", (1, 7)), ("dev", (0, 0)), ("", (0, 0))],
)
def test_versions(text: str, version: tuple[int, int]) -> None:
    assert version_of(text) == version
