"""Kernels are compiled without a GPU, for every GPU, to PTX that an ahead-of-time plugin may have."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from plugins.kernels.compile import CompileError, CompilerMissingError, compile_kernel, compile_kernels
from plugins.kernels.hardware import HARDWARE, Capability, UnknownCapabilityError, hardware_of
from plugins.kernels.library import KernelLibrary
from plugins.kernels.spec import KernelSpec
from tests.plugins.kernels.samples import multiply, scale_rows, to_fp8

ROOT = Path(__file__).parents[3]
DIRECTIVES = re.compile(r"^\.(version|target) (\S+)$", re.MULTILINE)


def test_every_gpu_has_ptx_of_its_own(library: KernelLibrary) -> None:
    for capability, hardware in HARDWARE.items():
        for kernel in library.tactics("ScaleRows_k64", capability):
            version = f"{hardware.ptx_version // 10}.{hardware.ptx_version % 10}"
            assert dict(DIRECTIVES.findall(kernel.ptx)) == {"version": version, "target": hardware.architecture}
            assert kernel.ptx_version == hardware.ptx_version
            assert kernel.ptx.count(".entry") == 1
            assert f".visible .entry {kernel.entry}(" in kernel.ptx
            assert kernel.shared_bytes == 0


def test_no_operation_is_contracted(library: KernelLibrary) -> None:
    """x · factor + factor: two roundings, which the driver must not fuse either, so both say .rn."""
    for kernel in library.kernels:
        assert not re.search(r"\bfma\b|\bmad\.(?!lo|wide|hi)", kernel.ptx)
        assert re.search(r"\bmul\.rn\.f32", kernel.ptx)
        assert not re.search(r"\b(mul|add|sub)\.f32", kernel.ptx)
        assert ".ftz" not in kernel.ptx


def test_nothing_of_this_machine_is_in_the_ptx(library: KernelLibrary) -> None:
    for kernel in library.kernels:
        assert not re.search(r"\.loc\b|\.file\b|/", re.sub(r"//.*", "", kernel.ptx))


def test_the_same_source_gives_the_same_bytes(
    library: KernelLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernel = library.tactics("ScaleRows_k64", (9, 0))[0]
    assert compile_kernel(scale_rows(kernel.entry), (9, 0)).ptx == kernel.ptx


def test_shared_memory_and_registers_are_reported() -> None:
    kernel = compile_kernel(multiply(64, stages=2), (9, 0))
    assert kernel.shared_bytes == 2 * 2 * 64 * 64 * 2
    assert 16 < kernel.resources.registers <= 255
    assert kernel.resources.spill_store_bytes == kernel.resources.spill_load_bytes == 0
    assert re.fullmatch(r"Triton \d+\.\d+.*", kernel.compiler)


@pytest.mark.parametrize(
    ("spec", "capability", "message"),
    [
        (multiply(128, stages=3), (9, 0), "multiply_128 for sm_90a: needs 196608 bytes of shared memory"),
        (to_fp8(), (8, 7), r"to_fp8 .* for sm_87 does not compile: .*fp8e4nv not supported in this architecture"),
        (replace(scale_rows(), constants={"K": 64}), (8, 0), "has the parameters x, factors, rows, y, K, ROWS"),
        (replace(scale_rows(), source="tests.plugins.kernels.sample_kernel:absent"), (8, 0), "no attribute 'absent'"),
        (scale_rows(name="../up"), (8, 0), r"'\.\./up' cannot name a kernel"),
    ],
)
def test_what_cannot_be_shipped_is_refused(spec: KernelSpec, capability: Capability, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        compile_kernel(spec, capability)


def test_a_compiler_that_dies_says_which_kernel_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM ends the process when a PTX version has no such GPU; the kernels before it are done."""
    old = replace(hardware_of((11, 0)), ptx_version=85)
    monkeypatch.setattr("plugins.kernels.hardware.HARDWARE", {(8, 0): hardware_of((8, 0)), (11, 0): old})
    kernels = compile_kernels([(scale_rows("first"), (8, 0)), (scale_rows("second"), (11, 0))])
    assert next(kernels).entry == "first"
    with pytest.raises(CompileError, match=r"second .* for sm_110a .*LLVM ERROR: PTX version 8\.5 does not support"):
        next(kernels)


def test_unknown_gpus_are_refused() -> None:
    with pytest.raises(UnknownCapabilityError, match=r"no kernels for compute capability 7\.5; known: 8\.0, 8\.6"):
        compile_kernel(scale_rows(), (7, 5))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plugins.kernels.compile.find_spec", lambda name: None)
    with pytest.raises(CompilerMissingError, match=r"not installed; pip install 'fp4export\[kernels\]'"):
        compile_kernel(scale_rows(), (9, 0))


STOPPING = """
import os
from plugins.kernels.compile import compile_kernels
from tests.plugins.kernels.samples import scale_rows

kernels = compile_kernels([(scale_rows(f"kernel_{count}"), (8, 0)) for count in range(3)])
next(kernels)
kernels.close()
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("no process left")
"""


def test_no_process_is_left_when_the_caller_stops() -> None:
    # In a process of its own: this one may have children of other tests.
    run = subprocess.run([sys.executable, "-c", STOPPING], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "no process left\n"
