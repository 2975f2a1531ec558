"""The doctor on machines that are made of files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.device import machine as machine_module
from exporter.device import requirements
from exporter.device.doctor import examine, report_text
from exporter.device.machine import Machine, emulates_bf16, look_around, package_version, saturates_int8_products
from exporter.gpu import Gpu
from exporter.targets import TARGETS

ALL = dict.fromkeys(("numpy", "onnx", "ml_dtypes", "polygraphy", "onnxruntime", "torch", "diffusers"), "1.0")


def _machine(gpu: Gpu | None = None, **packages: str) -> Machine:
    versions = {"tensorrt": "", "tensorrt_rtx": "", **ALL, **packages}
    flags = ("asimddp",)
    return Machine("3.10.1", "Linux aarch64", versions, flags, 8 << 30, 1 << 30, gpu, 4 << 30, "540.4", None, None)


def _verdict(target: str, machine: Machine) -> tuple[bool, str, str]:
    (found,) = [entry for entry in examine(machine).targets if entry.target == target]
    return found.ready, found.missing, found.note


def test_every_target_is_answered() -> None:
    report = examine(_machine())
    assert [entry.target for entry in report.targets] == list(TARGETS)
    assert all(entry.ready == (entry.missing == "") for entry in report.targets)


def test_an_orin_with_jetpack_6_builds_without_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    orin = Gpu("Orin", (8, 7), 64 << 30, True, (12, 6))
    monkeypatch.setattr(requirements, "local_gpu", lambda: orin)
    monkeypatch.setattr(requirements, "installed_version", lambda *, rtx: (10, 3))
    machine = _machine(orin, tensorrt="10.3.0")
    ready, missing, note = _verdict("orin", machine)
    assert (ready, missing) == (True, "")
    assert note == "without plugins (kernels: native): they need TensorRT 10.9 or later"
    ready, missing, _ = _verdict("h100", machine)
    assert not ready
    assert "here Orin with compute capability 8.7, not 9.0; it can build for orin" in missing
    monkeypatch.setattr(requirements, "installed_version", lambda *, rtx: (11, 4))
    assert _verdict("orin", _machine(orin, tensorrt="11.4.1")) == (True, "", "")


def test_the_one_thing_missing_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "local_gpu", lambda: Gpu("H100", (9, 0)))
    monkeypatch.setattr(requirements, "installed_version", lambda *, rtx: None)
    assert _verdict("h100", _machine())[1] == (
        "TensorRT is not installed here (pip install tensorrt; on a Jetson it comes with JetPack)"
    )
    assert _verdict("h100", _machine(polygraphy=""))[1] == "polygraphy is not installed (pip install polygraphy)"
    assert _verdict("cpu", _machine(onnxruntime=""))[1] == "onnxruntime is not installed (pip install onnxruntime)"
    assert examine(_machine(torch="")).export_missing == "torch: pip install fp4export"


def test_a_cpu_without_dot_products_is_told() -> None:
    machine = _machine()
    assert _verdict("cpu", machine) == (True, "", "")
    bare = Machine(**{**vars(machine), "cpu_flags": ("avx2",)})
    assert "W4A8 with INT8 activations is not exact here" in _verdict("cpu", bare)[2]


@pytest.mark.parametrize(
    ("line", "saturates", "emulates"),
    [
        ("flags\t\t: fpu avx2", True, True),
        ("flags\t\t: fpu avx2 avx_vnni", False, True),
        ("flags\t\t: fpu avx512f", True, True),
        ("flags\t\t: fpu avx512f avx512_bf16", True, False),
        ("flags\t\t: fpu amx_bf16", True, False),
        ("Features\t: fp asimd", False, True),
        ("Features\t: fp asimd bf16", False, False),
        ("", False, False),
    ],
)
def test_which_cpus_saturate_int8_products_and_emulate_bf16(
    tmp_path: Path, line: str, saturates: bool, emulates: bool
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert saturates_int8_products(tmp_path) == saturates
    assert emulates_bf16(tmp_path) == emulates


def test_the_report_has_every_fact_in_text_and_json() -> None:
    report = examine(_machine(Gpu("Orin", (8, 7), 64 << 30, True, (12, 6)), tensorrt="10.3.0"))
    text = report_text(report)
    assert "Orin, compute capability 8.7, 64.00 GiB shared with the CPU, 4.00 GiB free, CUDA 12.6" in text
    assert "tensorrt       10.3.0" in text
    document = json.loads(report.to_json())
    assert document["machine"]["gpu"]["compute_capability"] == [8, 7]
    assert document["machine"]["packages"]["tensorrt_rtx"] == ""


def test_a_jetson_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "local_gpu", lambda: None)
    files = {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
        "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\n",
        "proc/meminfo": "MemAvailable:    1024 kB\n",
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    found = look_around(tmp_path)
    assert (found.jetson_linux, found.jetpack) == ("36.4.3", "6")
    assert found.cpu_flags == ("asimddp",)
    assert found.memory_bytes == 1 << 20
    assert found.driver == "540.4.0"


def test_a_machine_without_any_of_the_files(tmp_path: Path) -> None:
    found = look_around(tmp_path)
    assert (found.jetson_linux, found.jetpack, found.driver, found.memory_bytes) == (None, None, None, None)
    assert "no NVIDIA driver" in report_text(examine(found))


def test_packages_are_found_by_the_module_that_they_bring() -> None:
    assert package_version("numpy").count(".") == 2
    assert package_version("google")
    assert package_version("no_such_package") == ""
