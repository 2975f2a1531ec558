"""Kernels for this machine's GPU, compiled once and kept on disk."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from exporter.errors import EnvironmentLacksError
from exporter.workdir import key_of
from plugins.kernels.compile import CompileError, CompilerMissingError, compile_library
from plugins.kernels.hardware import Capability, hardware_of
from plugins.kernels.library import KernelLibrary, KernelLibraryError, LibraryKernel
from plugins.tensorrt_plugins.variant import PluginVariant

_KEY_LENGTH = 16


def cache_folder() -> Path:
    """Where compiled kernels are kept: $FP4EXPORT_CACHE, else fp4export/kernels in the user's cache."""
    chosen = os.environ.get("FP4EXPORT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fp4export" / "kernels"


def obtain_tactics(variant: PluginVariant, capability: Capability, folder: Path) -> tuple[LibraryKernel, ...]:
    """All tactics of an operator, from `folder` if they are there whole, else compiled (seconds each) and kept.

    A folder belongs to one source, compiler and GPU. Raises `EnvironmentLacksError` where Triton is not installed or
    does not compile a kernel, and where the folder cannot be written.
    """
    label = hardware_of(capability).label
    key = key_of(stage="kernels", operators=[variant.op_type], gpu=capability, compiler=_triton())
    place = folder / f"{variant.op_type}_{label}_{key[:_KEY_LENGTH]}"
    try:
        return KernelLibrary.load(place).tactics(variant.op_type, capability)
    except KernelLibraryError:
        pass  # absent, or damaged: made anew
    try:
        library = compile_library([variant], [capability])
        folder.mkdir(parents=True, exist_ok=True)
        library.save(place)
    except (CompilerMissingError, CompileError) as error:
        raise EnvironmentLacksError(f"GPU {label}: {error}; the Triton here is {_triton()}") from error
    except (KernelLibraryError, OSError) as error:
        raise EnvironmentLacksError(f"{error}; set FP4EXPORT_CACHE to a folder for compiled kernels") from error
    return library.tactics(variant.op_type, capability)


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"
