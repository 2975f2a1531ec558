"""Asking the CUDA driver: a stand-in answers as the driver's functions do, since there is no GPU here."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from exporter.gpu import Gpu, available_memory, free_memory, local_gpu

_ANSWERS = {18: 1, 75: 8, 76: 7}


class Driver:
    """An Orin's driver; `broken` names the function that fails."""

    def __init__(self, devices: int = 1, broken: str = "") -> None:
        self.devices, self.broken, self.released = devices, broken, 0

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            return 999 if name == self.broken else self.answer(name, arguments)

        return call

    def answer(self, name: str, arguments: tuple[Any, ...]) -> int:
        if name == "cuDeviceGetCount":
            arguments[0]._obj.value = self.devices
        elif name == "cuDeviceGetName":
            arguments[0].value = b"Orin"
        elif name == "cuDeviceTotalMem_v2":
            arguments[0]._obj.value = 64 << 30
        elif name == "cuDriverGetVersion":
            arguments[0]._obj.value = 12060
        elif name == "cuDeviceGetAttribute":
            arguments[0]._obj.value = _ANSWERS[arguments[1]]
        elif name == "cuMemGetInfo_v2":
            arguments[0]._obj.value, arguments[1]._obj.value = 5 << 30, 8 << 30
        elif name == "cuDevicePrimaryCtxRelease_v2":
            self.released += 1
        return 0


def test_a_gpu_is_described() -> None:
    assert local_gpu(Driver()) == Gpu("Orin", (8, 7), 64 << 30, True, (12, 6))
    assert Gpu("Orin", (8, 7)).capability_text == "8.7"


def test_no_device_or_a_broken_driver_is_no_gpu() -> None:
    assert local_gpu(Driver(devices=0)) is None
    for name in ("cuInit", "cuDeviceGetName", "cuDeviceGetAttribute"):
        assert local_gpu(Driver(broken=name)) is None


def test_free_memory_gives_its_context_back() -> None:
    driver, gpu = Driver(), Gpu("L4", (8, 9))
    assert free_memory(gpu, driver) == 5 << 30
    assert driver.released == 1
    broken = Driver(broken="cuMemGetInfo_v2")
    assert free_memory(gpu, broken) is None
    assert broken.released == 1
    assert free_memory(gpu, Driver(broken="cuDevicePrimaryCtxRetain")) is None


def test_an_integrated_gpu_has_what_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.gpu.available_memory", lambda: 123)
    assert free_memory(Gpu("Orin", (8, 7), integrated=True), Driver()) == 123
    listing = tmp_path / "meminfo"
    listing.write_text("MemTotal:       100 kB\nMemAvailable:    42 kB\n")
    assert available_memory(listing) == 42 * 1024
    listing.write_text("MemTotal:       100 kB\n")
    assert available_memory(listing) is None
    assert available_memory(tmp_path / "none") is None


def test_the_driver_s_own_library_is_asked_where_there_is_one() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert local_gpu() is None
    else:
        assert local_gpu() == local_gpu()
