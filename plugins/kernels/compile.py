"""Kernels compiled ahead of time: Triton's PTX, for a GPU that need not be here, and what ptxas says of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Protocol

from plugins.kernels.hardware import MAX_SHARED_BYTES, WARP_SIZE, Capability, hardware_of
from plugins.kernels.library import KernelLibrary, LibraryKernel
from plugins.kernels.ptx import NAME, PtxError, Resources, finish, parse_resources
from plugins.kernels.spec import KernelSpec

# Operations round one by one, as in the references; source lines would put this machine's paths into the PTX.
_ENVIRONMENT = {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "0", "TRITON_DISABLE_LINE_INFO": "1"}


class CompileError(RuntimeError):
    """A kernel that does not compile, or that TensorRT could not launch. `log` is all that the compiler printed."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class CompilerMissingError(RuntimeError):
    """Triton is not installed."""


class KernelVariant(Protocol):
    """An operator that has kernels."""

    @property
    def op_type(self) -> str:
        """Node type."""

    def kernels(self, capability: Capability) -> tuple[KernelSpec, ...]:
        """One kernel per tactic, the best default first."""


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel as it is loaded: entry `spec.name` of `ptx`, with `shared_bytes` of dynamic shared memory."""

    spec: KernelSpec
    capability: Capability
    ptx: str
    shared_bytes: int
    ptx_version: int
    resources: Resources
    compiler: str

    @property
    def entry(self) -> str:
        """The name of the function in the PTX."""
        return self.spec.name


def compile_kernel(spec: KernelSpec, capability: Capability) -> CompiledKernel:
    """One kernel, for GPUs of a compute capability. Raises as `compile_kernels`."""
    [kernel] = compile_kernels([(spec, capability)])
    return kernel


def compile_kernels(requests: Iterable[tuple[KernelSpec, Capability]]) -> Iterator[CompiledKernel]:
    """The kernels in turn, each as soon as it is done. Triton runs in one process of its own for all of them.

    Raises:
        CompilerMissingError: no Triton.
        CompileError: a kernel does not compile, uses what an ahead-of-time plugin cannot have (scratch memory, tensor
            descriptors, clusters, more than 48 KiB of shared memory), or has other parameters than described.
        UnknownCapabilityError: no such GPUs are known.
    """
    wanted = list(requests)
    lines = [json.dumps(_request(spec, capability)) for spec, capability in wanted]
    if find_spec("triton") is None:
        raise CompilerMissingError(
            "kernels are compiled by Triton, which is not installed; pip install 'fp4export[kernels]'"
        )
    with _worker(lines) as (answers, log):
        for spec, capability in wanted:
            line = answers.readline()
            if not line:
                raise _failure(spec, capability, _text(log))
            yield _finished(spec, capability, json.loads(line))


def compile_library(
    variants: Iterable[KernelVariant],
    capabilities: Sequence[Capability],
    on_kernel: Callable[[CompiledKernel], None] = lambda kernel: None,
) -> KernelLibrary:
    """All tactics of all operators, each operator once, for all the capabilities. Raises as `compile_kernels`.

    `on_kernel` is told of each kernel when it is compiled.
    """
    distinct = {variant.op_type: variant for variant in variants}
    wanted = [
        (op_type, tactic, spec, capability)
        for capability in capabilities
        for op_type, variant in sorted(distinct.items())
        for tactic, spec in enumerate(variant.kernels(capability))
    ]
    kernels, compiler = [], ""
    compiled = compile_kernels([(spec, capability) for _, _, spec, capability in wanted])
    for (op_type, tactic, spec, capability), kernel in zip(wanted, compiled, strict=True):
        on_kernel(kernel)
        compiler = kernel.compiler
        kernels.append(
            LibraryKernel(
                op_type=op_type,
                tactic=tactic,
                capability=capability,
                entry=kernel.entry,
                inputs=spec.inputs,
                scalars=spec.scalars,
                outputs=spec.outputs,
                launch=spec.launch,
                shared_bytes=kernel.shared_bytes,
                ptx_version=kernel.ptx_version,
                ptx=kernel.ptx,
            )
        )
    return KernelLibrary(tuple(kernels), compiler)


def _request(spec: KernelSpec, capability: Capability) -> dict[str, Any]:
    if not NAME.fullmatch(spec.name):
        raise CompileError(f"{spec.name!r} cannot name a kernel; letters, digits and _ only, at most 200")
    hardware = hardware_of(capability)
    return {
        "source": spec.source,
        "arguments": [
            *(f"*{pointer.element}" for pointer in spec.inputs),
            *("i32" for _ in spec.scalars),
            *(f"*{pointer.element}" for pointer in spec.outputs),
        ],
        "constants": dict(spec.constants),
        "compute_capability": 10 * capability[0] + capability[1],
        "options": {
            "num_warps": spec.launch.num_warps,
            "num_stages": spec.num_stages,
            "ptx_version": hardware.ptx_version,
            "enable_fp_fusion": False,
            "enable_reflect_ftz": False,
        },
    }


@contextmanager
def _worker(lines: Sequence[str]) -> Iterator[tuple[IO[str], IO[str]]]:
    """Standard output of the compiling process, and the file that its standard error goes to."""
    environment = os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "plugins.kernels.compile_worker"]
    with tempfile.TemporaryFile("w+") as requests, tempfile.TemporaryFile("w+", errors="replace") as log:
        requests.write("\n".join(lines))
        requests.seek(0)
        with subprocess.Popen(  # noqa: S603 - a fixed command line
            command, stdin=requests, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as process:
            try:
                if process.stdout is None:
                    raise CompileError("the compiling process has no output")
                yield process.stdout, log
            finally:
                process.kill()


def _finished(spec: KernelSpec, capability: Capability, answer: dict[str, Any]) -> CompiledKernel:
    refused = {
        f"{answer['scratch_bytes']} bytes of scratch memory": answer["scratch_bytes"] != 0,
        "tensor descriptors": answer["descriptors"] != 0,
        f"clusters of {answer['clusters']}": answer["clusters"] != 1,
        f"{answer['shared_bytes']} bytes of shared memory (of {MAX_SHARED_BYTES})": answer["shared_bytes"]
        > MAX_SHARED_BYTES,
    }
    where = f"{spec.name} for {hardware_of(capability).architecture}"
    for what, used in refused.items():
        if used:
            raise CompileError(f"{where}: needs {what}, which an ahead-of-time plugin cannot have; take a smaller tile")
    parameters = len(spec.inputs) + len(spec.scalars) + len(spec.outputs)
    try:
        text = finish(answer["ptx"], spec.name, parameters, WARP_SIZE * spec.launch.num_warps)
        resources = _assemble(text, hardware_of(capability).architecture, answer["ptxas"])
    except PtxError as error:
        raise CompileError(f"{where}: {error}") from error
    return CompiledKernel(
        spec,
        capability,
        text,
        answer["shared_bytes"],
        hardware_of(capability).ptx_version,
        resources,
        answer["compiler"],
    )


def _assemble(text: str, architecture: str, ptxas: str) -> Resources:
    """Run ptxas with a driver's defaults on exactly what is shipped."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(text, encoding="utf-8")
        command = [ptxas, "--verbose", f"--gpu-name={architecture}", str(source), "--output-file", f"{source}.cubin"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - Triton's ptxas
    if result.returncode:
        raise CompileError(f"ptxas refuses the PTX for {architecture}: {_reason(result.stderr)}", result.stderr)
    return parse_resources(result.stderr)


def _failure(spec: KernelSpec, capability: Capability, log: str) -> CompileError:
    where = f"{spec.name} ({spec.source}) for {hardware_of(capability).architecture}"
    return CompileError(f"{where} does not compile: {_reason(log)}", log)


def _reason(log: str) -> str:
    """The line that says most: LLVM's or ptxas's first error, else the last line (a traceback's end)."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("LLVM ERROR", "ptxas"))]
    return next(iter(errors or lines[-1:]), "the compiler ended without a word")


def _text(log: IO[str]) -> str:
    log.seek(0)
    return log.read()
