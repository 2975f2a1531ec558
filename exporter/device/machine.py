"""What this machine has, told by files, package metadata and the CUDA driver; imports none of the packages."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from exporter.gpu import Gpu, available_memory, free_memory, local_gpu

_PACKAGES = (
    "numpy",
    "onnx",
    "ml_dtypes",
    "polygraphy",
    "tensorrt",
    "tensorrt_rtx",
    "onnxruntime",
    "torch",
    "diffusers",
    "triton",
)
# As Linux names them: 8-bit dot products of x86 (VNNI, AMX) and of ARM (dot product, i8mm).
_CPU_FLAGS = ("avx2", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
_INT8_DOT_PRODUCTS = frozenset(_CPU_FLAGS) - {"avx2"}
# Of x86, the second by tiles, and of ARM.
_BF16_PRODUCTS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_TEGRA_RELEASE = re.compile(r"R(\d+) \(release\), REVISION: ([\d.]+)")
_DRIVER = re.compile(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)")
# JetPack's first number by that of Jetson Linux.
_JETPACK: Mapping[int, str] = {35: "5", 36: "6", 38: "7", 39: "7"}


@dataclass(frozen=True)
class Machine:
    """This machine. `packages`: version by name, "" where it is not installed; `gpu_free_bytes`, `driver` and
    `jetson_linux` are None where there is none or nothing tells."""

    python: str
    system: str
    packages: Mapping[str, str]
    cpu_flags: tuple[str, ...]
    memory_bytes: int | None
    disk_free_bytes: int
    gpu: Gpu | None
    gpu_free_bytes: int | None
    driver: str | None
    jetson_linux: str | None
    jetpack: str | None

    @property
    def has_int8_dot_products(self) -> bool:
        """Whether the CPU is known to add 8-bit products in 32 bits."""
        return not _INT8_DOT_PRODUCTS.isdisjoint(self.cpu_flags)


def look_around(root: Path = Path("/"), folder: Path = Path()) -> Machine:
    """Describe the machine whose files are below `root`; `folder` is where output would be written."""
    gpu = local_gpu()
    linux, jetpack = _jetson(_text(root / "etc/nv_tegra_release"))
    driver = _DRIVER.search(_text(root / "proc/driver/nvidia/version"))
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages={name: package_version(name) for name in _PACKAGES},
        cpu_flags=_flags(_text(root / "proc/cpuinfo").splitlines()),
        memory_bytes=available_memory(root / "proc/meminfo"),
        disk_free_bytes=shutil.disk_usage(folder).free,
        gpu=gpu,
        gpu_free_bytes=free_memory(gpu) if gpu is not None else None,
        driver=driver[1] if driver else None,
        jetson_linux=linux,
        jetpack=jetpack,
    )


def saturates_int8_products(root: Path = Path("/")) -> bool:
    """Whether the CPU is known to be an x86 without VNNI, which adds pairs of 8-bit products in 16 bits."""
    lines = _text(root / "proc/cpuinfo").splitlines()
    # ARM's line is called Features.
    is_x86 = any(line.split(":")[0].strip() == "flags" for line in lines)
    return is_x86 and _INT8_DOT_PRODUCTS.isdisjoint(_flags(lines))


def emulates_bf16(root: Path = Path("/")) -> bool:
    """Whether the CPU is known to have no BF16 products."""
    present = _all_flags(_text(root / "proc/cpuinfo").splitlines())
    return bool(present) and _BF16_PRODUCTS.isdisjoint(present)


def package_version(name: str) -> str:
    """The version of the distribution that brings the module `name`, "" where there is none."""
    found = _distributions().get(name, [])
    # A distribution may say that it is there and have left its metadata behind.
    for distribution in (name.replace("_", "-"), *found):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


@cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def _jetson(release: str) -> tuple[str | None, str | None]:
    """Jetson Linux's version and JetPack's first number; None twice on other machines."""
    found = _TEGRA_RELEASE.search(release)
    if found is None:
        return None, None
    return f"{found[1]}.{found[2]}", _JETPACK.get(int(found[1]))


def _flags(lines: Iterable[str]) -> tuple[str, ...]:
    present = _all_flags(lines)
    return tuple(flag for flag in _CPU_FLAGS if flag in present)


def _all_flags(lines: Iterable[str]) -> set[str]:
    heads = ("flags", "Features")
    line = next((line for line in lines if line.split(":")[0].strip() in heads), "")
    return set(line.partition(":")[2].split())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
