"""What becomes of a built engine where its GPU is: there is none here, so the worker's answers are given by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from exporter.device import build, checks, requirements
from exporter.device.build import BuildOptions, EngineInfo, build_engine, timing_cache_path
from exporter.device.child import WorkerError
from exporter.device.jobs import EngineCheck, EngineJob
from exporter.errors import EnvironmentLacksError, FidelityError, InputError
from exporter.gpu import Gpu
from exporter.progress import NullProgress
from exporter.targets import TARGETS
from tests.exporter.device.lowered_graphs import write_lowered


class Worker:
    """An Orin's TensorRT: `inputs` are the types that the product reads, `snr` what the comparison finds."""

    def __init__(self) -> None:
        self.inputs, self.snr, self.errors = ["Int8", "Int8"], 60.0, {}
        self.jobs: list[EngineJob] = []

    def __call__(self, stage: str, job: EngineJob | EngineCheck, title: str, progress: object) -> dict[str, Any]:
        if stage in self.errors:
            raise WorkerError(self.errors[stage])
        if isinstance(job, EngineJob):
            self.jobs.append(job)
            Path(job.engine).write_bytes(b"engine")
            if job.new_timing_cache:
                Path(job.new_timing_cache).write_bytes(b"times")
            return {"version": "10.3.0", "timing_cache": "used" if job.timing_cache else "new"}
        assert Path(job.engine).read_bytes() == b"engine"
        if stage == "load":
            layer = {
                "Metadata": "[ONNX Layer: fc.matmul_1]",
                "Inputs": [{"Format/Datatype": text} for text in self.inputs],
            }
            Path(job.layers).write_text(json.dumps({"Layers": [layer]}))
        return {"version": "10.3.0", "snr": {"sample": self.snr}}


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    made = Worker()
    orin = Gpu("Orin", (8, 7), 8 << 30, True)
    monkeypatch.setattr(build, "run_worker", made)
    monkeypatch.setattr(checks, "run_worker", made)
    monkeypatch.setattr(checks, "local_gpu", lambda: orin)
    monkeypatch.setattr(requirements, "local_gpu", lambda: orin)
    monkeypatch.setattr(requirements, "installed_version", lambda *, rtx: (10, 3))
    monkeypatch.setattr(build, "installed_version", lambda *, rtx: (10, 3))
    monkeypatch.setattr(build, "local_gpu", lambda: orin)
    monkeypatch.setattr(build, "free_memory", lambda gpu: 8 << 30)
    return made


@pytest.fixture
def lowered(tmp_path: Path) -> Path:
    """A lowered graph with a gate's files beside it."""
    gate = tmp_path / "gate.orin"
    gate.mkdir()
    for name in ("model.inputs.json", "model.reference.json"):
        (gate / name).write_text("[]")
    row = {"stage": "lowered", "kind": "end_to_end", "threshold_db": 50.0}
    (gate / "result.json").write_text(json.dumps({"passed": True, "rows": [row]}))
    return write_lowered(tmp_path, "orin")


def _build(lowered: Path, **options: Any) -> EngineInfo:
    return build_engine(
        lowered, lowered.with_name("out.plan"), TARGETS["orin"], NullProgress(), BuildOptions(**options)
    )


def test_an_engine_that_is_as_planned_passes_all(worker: Worker, lowered: Path) -> None:
    info = _build(lowered)
    assert [check.state for check in info.checks] == ["passed"] * 3
    assert "1 of 1 are as planned" in info.checks[1].detail
    assert "SNR of sample 60.0 dB, at least 50.0 dB needed; repeat: polygraphy run " in info.checks[2].detail
    assert info.builder == "TensorRT 10.3.0"
    kept = {path.name for path in lowered.parent.iterdir()}
    assert kept == {"lowered.orin.onnx", "gate.orin", "out.plan", "out.timing.cache", "out.layers.json"}


def test_other_kernels_measurements_are_not_taken_for_these(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "same", "other")]
    for folder, content in zip(folders, ("{}", "{}", '{"kernels": []}'), strict=True):
        folder.mkdir()
        (folder / "kernels.json").write_text(content)
    output = tmp_path / "e.plan"
    one, same, other = (timing_cache_path(output, folder) for folder in folders)
    assert one == same
    assert len({one, other, timing_cache_path(output)}) == 3
    assert {path.parent for path in (one, other)} == {tmp_path}
    assert all(path.name.startswith("e.") and path.name.endswith(".timing.cache") for path in (one, other))


def test_the_timing_cache_is_used_by_the_next_build(worker: Worker, lowered: Path) -> None:
    _build(lowered)
    _build(lowered)
    _build(lowered, timing_cache=False)
    assert [job.timing_cache and Path(job.timing_cache).name for job in worker.jobs] == [None, "out.timing.cache", None]
    assert [job.new_timing_cache is None for job in worker.jobs] == [False, False, True]


@pytest.mark.parametrize(("inputs", "found"), [(["Float", "Float"], "reads Float"), (["Half", "Float"], "Float, Half")])
def test_a_layer_that_became_float_fails_by_name(worker: Worker, lowered: Path, inputs: list[str], found: str) -> None:
    worker.inputs = inputs
    with pytest.raises(FidelityError, match=rf"1 of 1: fc is planned as int8 and .*{found}") as caught:
        _build(lowered)
    assert caught.value.exit_code == 4
    assert not lowered.with_name("out.plan").exists()
    assert lowered.with_name("out.rejected.plan").read_bytes() == b"engine"


@pytest.mark.parametrize("snr", [49.9, float("nan"), float("-inf")])
def test_outputs_that_deviate_fail(worker: Worker, lowered: Path, snr: float) -> None:
    worker.snr = snr
    with pytest.raises(FidelityError, match=r"acceptance: failed: SNR of sample .*at least 50\.0 dB needed"):
        _build(lowered)


@pytest.mark.parametrize(("stage", "name"), [("load", "loaded in a fresh process"), ("compare", "acceptance")])
def test_a_worker_that_fails_after_the_build_fails_the_check(
    worker: Worker, lowered: Path, stage: str, name: str
) -> None:
    worker.errors[stage] = "it crashed"
    with pytest.raises(FidelityError, match=f"{name}: failed: it crashed"):
        _build(lowered)


def test_what_was_not_asked_is_said(worker: Worker, lowered: Path) -> None:
    assert _build(lowered, acceptance=False).checks[2].sentence() == "acceptance: not run: --no-acceptance"
    shutil.rmtree(lowered.with_name("gate.orin"))
    assert "has no saved inputs and outputs" in _build(lowered).checks[2].detail


def test_memory_that_runs_out_is_the_machine_s_lack(
    worker: Worker, lowered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.errors["build"] = "Error Code 2: OutOfMemory (Requested size was 12345 bytes.)"
    with pytest.raises(EnvironmentLacksError, match="use a smaller largest batch"):
        _build(lowered)
    worker.errors["build"] = "Error Code 4: API Usage Error"
    with pytest.raises(InputError, match="orin cannot be built: Error Code 4"):
        _build(lowered)
    monkeypatch.setattr(build, "free_memory", lambda gpu: 100)
    with pytest.raises(EnvironmentLacksError, match=r"its weights alone are .*, and 100 B of device memory are free"):
        _build(lowered)
    assert not worker.jobs
