"""What building for a target needs, and whether this machine has it; imports none of what it looks for."""

from __future__ import annotations

import importlib.util

from exporter.device.machine import package_version
from exporter.device.versions import load_module, module_name, version_of
from exporter.gpu import Gpu, local_gpu
from exporter.targets import TARGETS, Target

OLDEST_RTX = (1, 3)


def installed_version(*, rtx: bool) -> tuple[int, int] | None:
    """(major, minor) of TensorRT-RTX or of TensorRT on this machine, None without a usable one.

    Imports it only where package metadata do not tell.
    """
    name = module_name(rtx=rtx)
    try:
        if importlib.util.find_spec(name) is None:
            return None
        return version_of(package_version(name) or str(load_module(rtx=rtx).__version__))
    except ImportError:
        return None


def missing_builder(target: Target) -> str:
    """What building for `target` needs and this machine does not have; "" if it has all."""
    if target.engine == "onnxruntime":
        return ""
    rtx = target.engine == "tensorrt-rtx"
    wrong_gpu = "" if rtx else _wrong_gpu(target, local_gpu())
    if wrong_gpu:
        return wrong_gpu
    version = installed_version(rtx=rtx)
    if version is not None:
        return _too_old(target, version)
    if rtx:
        return "TensorRT-RTX is not installed here (pip install tensorrt-rtx)"
    return "TensorRT is not installed here (pip install tensorrt; on a Jetson it comes with JetPack)"


def oldest_version(target: Target) -> tuple[int, int]:
    """The oldest TensorRT, or TensorRT-RTX, that builds for `target`."""
    if target.engine == "tensorrt-rtx":
        return OLDEST_RTX
    return release_of(target.parsers[0])


def _too_old(target: Target, version: tuple[int, int]) -> str:
    oldest = oldest_version(target)
    if version >= oldest:
        return ""
    name = "TensorRT-RTX" if target.engine == "tensorrt-rtx" else "TensorRT"
    here, wanted = (".".join(map(str, pair)) for pair in (version, oldest))
    return f"{name} {here} is installed here, and target {target.name} needs {wanted} or later"


def _wrong_gpu(target: Target, gpu: Gpu | None) -> str:
    if gpu is None:
        return "there is no NVIDIA GPU here, and TensorRT builds only for the GPU it runs on"
    if gpu.compute_capability == target.compute_capability:
        return ""
    fitting = [name for name, other in TARGETS.items() if other.compute_capability == gpu.compute_capability]
    can = f"; it can build for {', '.join(fitting)}" if fitting else ""
    wanted = ".".join(map(str, target.compute_capability or ()))
    return (
        f"TensorRT builds only for the GPU it runs on, here {gpu.name} with compute capability "
        f"{gpu.capability_text}, not {wanted}{can}"
    )


def release_of(name: str) -> tuple[int, int]:
    """(major, minor) of a release's name: ``10.3``, ``11``."""
    major, _, minor = name.partition(".")
    return int(major), int(minor or 0)
