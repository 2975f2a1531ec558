"""The GPU of this machine, as its driver describes it."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
# CUdevice_attribute of cuda.h.
_INTEGRATED, _MAJOR, _MINOR = 18, 75, 76
_NAME_BYTES = 256
_MEMORY_FILE = Path("/proc/meminfo")


@dataclass(frozen=True)
class Gpu:
    """The first GPU that CUDA would use.

    `integrated`: it shares the machine's memory, as on a Jetson. `cuda` is the newest CUDA version that the driver
    runs, (major, minor).
    """

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int = 0
    integrated: bool = False
    cuda: tuple[int, int] = (0, 0)

    @property
    def capability_text(self) -> str:
        """``8.7``."""
        return ".".join(map(str, self.compute_capability))


class _DriverError(Exception):
    """The driver answered with an error code."""


def open_driver() -> Any | None:
    """The CUDA driver's library; None where there is no driver."""
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError:
        return None


def local_gpu(driver: Any | None = None) -> Gpu | None:
    """The first GPU that CUDA would use (`CUDA_VISIBLE_DEVICES` counts), None without driver or GPU.

    Makes no CUDA context. `driver` is what `open_driver` gives.
    """
    driver = driver or open_driver()
    if driver is None:
        return None
    try:
        return _describe(driver)
    except _DriverError:
        return None


def free_memory(gpu: Gpu, driver: Any | None = None) -> int | None:
    """Bytes that can be allocated on `gpu` now; None where nothing says so.

    A discrete GPU is asked through a CUDA context, which is given back. An integrated one counts as free only what no
    cache of the machine holds, so there the machine is asked.
    """
    if gpu.integrated:
        return available_memory()
    driver = driver or open_driver()
    if driver is None:
        return None
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    try:
        _call(driver.cuInit, 0)
        _call(driver.cuDeviceGet, ctypes.byref(device), 0)
        _call(driver.cuDevicePrimaryCtxRetain, ctypes.byref(context), device)
        try:
            _call(driver.cuCtxSetCurrent, context)
            _call(driver.cuMemGetInfo_v2, ctypes.byref(free), ctypes.byref(total))
        finally:
            driver.cuDevicePrimaryCtxRelease_v2(device)
    except _DriverError:
        return None
    return free.value


def available_memory(listing: Path = _MEMORY_FILE) -> int | None:
    """Bytes of main memory that programs can still get, None where the system does not tell."""
    try:
        lines = listing.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = dict(line.split(":", 1) for line in lines if ":" in line)
    words = sizes.get("MemAvailable", "").split()
    return int(words[0]) * 1024 if words and words[0].isdecimal() else None


def _describe(driver: Any) -> Gpu | None:
    _call(driver.cuInit, 0)
    count, device, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    _call(driver.cuDeviceGetCount, ctypes.byref(count))
    if not count.value:
        return None
    _call(driver.cuDeviceGet, ctypes.byref(device), 0)
    name, size = ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_size_t()
    _call(driver.cuDeviceGetName, name, _NAME_BYTES, device)
    _call(driver.cuDeviceTotalMem_v2, ctypes.byref(size), device)
    _call(driver.cuDriverGetVersion, ctypes.byref(version))
    integrated, major, minor = (_attribute(driver, number, device) for number in (_INTEGRATED, _MAJOR, _MINOR))
    cuda = (version.value // 1000, version.value % 1000 // 10)
    return Gpu(os.fsdecode(name.value), (major, minor), size.value, bool(integrated), cuda)


def _attribute(driver: Any, number: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _call(driver.cuDeviceGetAttribute, ctypes.byref(value), number, device)
    return value.value


def _call(function: Any, *arguments: object) -> None:
    code = function(*arguments)
    if code:
        raise _DriverError(code)
