"""The kernels of a graph's plugins, compiled once and kept beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from exporter.errors import EnvironmentLacksError
from exporter.onnx_files import read_model
from exporter.progress import Progress
from exporter.targets import Target
from exporter.workdir import WorkDir, key_of
from plugins.kernels.compile import CompileError, CompilerMissingError, compile_library
from plugins.kernels.hardware import Capability
from plugins.kernels.library import INDEX, KernelLibrary, KernelLibraryError, kernels_folder
from plugins.op import is_ours, parse
from plugins.tensorrt_plugins.variant import PluginVariant


def obtain_kernels(lowered: Path, target: Target, work: WorkDir, progress: Progress) -> tuple[Path, bool]:
    """The folder with the kernels of all plugins in `lowered`, for the target's GPU, and whether it was reused.

    Compiled anew where operators, their source or the compiler changed. Raises `EnvironmentLacksError` where Triton is
    not installed, or is one that does not compile a kernel.
    """
    if target.compute_capability is None:
        raise ValueError(f"target {target.name} has no GPU")
    operators = kernel_operators(lowered)
    folder = kernels_folder(lowered)
    key = key_of(stage="kernels", operators=sorted(operators), gpu=target.compute_capability, compiler=_triton())
    if work.is_current(folder / INDEX, key) and _is_whole(folder):
        return folder, True
    try:
        library = _compiled(tuple(operators.values()), target.compute_capability, target.name, progress)
    except CompilerMissingError as error:
        raise EnvironmentLacksError(f"target {target.name}: `kernels: plugin`: {error}") from error
    except CompileError as error:
        raise EnvironmentLacksError(
            f"target {target.name}: `kernels: plugin`: {error}; the Triton here is {_triton()}"
        ) from error
    library.save(folder)
    work.seal(folder / INDEX, key)
    return folder, False


def _compiled(
    operators: Sequence[PluginVariant], capability: Capability, target: str, progress: Progress
) -> KernelLibrary:
    """All kernels, in as many processes as there are cores."""
    count = sum(len(operator.kernels(capability)) for operator in operators)
    processes = max(1, min(os.cpu_count() or 1, len(operators)))
    shares = [operators[first::processes] for first in range(processes)]
    with progress.task(f"compiling kernels for {target}", count) as task, ThreadPoolExecutor(processes) as threads:
        compiling = [
            threads.submit(compile_library, share, [capability], on_kernel=lambda _: task.advance()) for share in shares
        ]
        libraries = [future.result() for future in compiling]
    kernels = sorted(
        (kernel for library in libraries for kernel in library.kernels), key=lambda one: (one.op_type, one.tactic)
    )
    return KernelLibrary(tuple(kernels), libraries[0].compiler)


def kernel_operators(lowered: Path) -> Mapping[str, PluginVariant]:
    """The plugins of a lowered graph by op_type."""
    nodes = read_model(lowered, external_data=False).graph.node
    names = sorted({node.op_type for node in nodes if is_ours(node)})
    operators = ((name, parse(name)) for name in names)
    return {name: operator for name, operator in operators if isinstance(operator, PluginVariant)}


def _is_whole(folder: Path) -> bool:
    try:
        KernelLibrary.load(folder)
    except KernelLibraryError:
        return False
    return True


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"
