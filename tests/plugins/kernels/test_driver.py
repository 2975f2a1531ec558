"""What the CUDA driver is asked for, by a stand-in for libcuda that writes it down."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from plugins.kernels.driver import Driver, DriverError, DriverMissingError
from plugins.kernels.library import KernelLibrary, LibraryKernel
from plugins.kernels.spec import Launch

INPUTS, OUTPUTS = (0x7F00_1234_5600, 0x7F00_1234_5700), (0x7F00_1234_5800,)


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("the stand-in for libcuda is compiled by gcc, which is not here")
    path = tmp_path_factory.mktemp("libcuda") / "libcuda.so.1"
    source = Path(__file__).with_name("stand_in.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, source], check=True)
    return str(path)


@pytest.fixture
def own_libcuda(libcuda: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy for one test: the stand-in opens its record once."""
    monkeypatch.setenv("STAND_IN_RECORD", str(tmp_path / "record"))
    return shutil.copy(libcuda, tmp_path / "libcuda.so.1")


@pytest.fixture
def kernel(library: KernelLibrary) -> LibraryKernel:
    return library.tactics("ScaleRows_k64", (9, 0))[0]


def test_a_launch_has_the_arguments_in_the_kernels_order(
    own_libcuda: str, kernel: LibraryKernel, tmp_path: Path
) -> None:
    kernel = replace(kernel, launch=Launch(rows_per_program=4, columns=3, num_warps=2), shared_bytes=512)
    with Driver(library=own_libcuda) as driver:
        assert driver.capability == (9, 0)
        loaded = driver.load(kernel)
        took = driver.milliseconds(lambda: loaded.launch(INPUTS, {"rows": 9}, OUTPUTS, stream=0x77))
        driver.synchronize()
    assert took == 1.5
    assert (tmp_path / "record").read_text().splitlines() == [
        "cuInit 0",
        "context 1234",
        f"function {kernel.entry} of abc",
        "event 1",
        "launch def grid 9 1 1 block 64 1 1 shared 512 stream 77 extra 0 arguments "
        "7f0012345600 7f0012345700 9 7f0012345800",
        "event 2",
        "synchronize",
        "unload abc",
        "release 0",
    ]


def test_both_scalars_are_passed(own_libcuda: str, kernel: LibraryKernel, tmp_path: Path) -> None:
    name = f"{kernel.entry}_param_2"
    ptx = kernel.ptx.replace(f".param .u32 {name}", f".param .u32 {name},\n\t.param .u32 {name}b", 1)
    two = replace(kernel, scalars=("rows", "rows_per_sample"), ptx=ptx)
    with Driver(library=own_libcuda) as driver:
        driver.load(two).launch(INPUTS, {"rows": 4096, "rows_per_sample": 1024}, OUTPUTS)
        with pytest.raises(DriverError, match="needs the scalar rows_per_sample"):
            driver.load(two).launch(INPUTS, {"rows": 4096}, OUTPUTS)
    assert "arguments 7f0012345600 7f0012345700 1000 400 7f0012345800" in (tmp_path / "record").read_text()


def test_wrong_counts_are_refused(own_libcuda: str, kernel: LibraryKernel) -> None:
    with Driver(library=own_libcuda) as driver:
        loaded = driver.load(kernel)
        with pytest.raises(DriverError, match="takes 2 inputs and 1 outputs, not 1 and 1"):
            loaded.launch(INPUTS[:1], {"rows": 1}, OUTPUTS)


def test_what_the_drivers_compiler_says_is_told(own_libcuda: str, kernel: LibraryKernel) -> None:
    with (
        Driver(library=own_libcuda) as driver,
        pytest.raises(DriverError, match=r"cuModuleLoadDataEx failed: bad image \(218\): ptxas fatal: no entry"),
    ):
        driver.load(replace(kernel, ptx="nothing"))


def test_kernels_of_another_gpu_are_refused(own_libcuda: str, library: KernelLibrary) -> None:
    with (
        Driver(library=own_libcuda) as driver,
        pytest.raises(DriverError, match=r"compute capability 8\.7, and this GPU has 9\.0"),
    ):
        driver.load(library.tactics("ScaleRows_k64", (8, 7))[0])


def test_machines_without_a_gpu_say_so(own_libcuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DriverMissingError, match=r"libabsent\.so cannot be loaded .*machines with an NVIDIA GPU"):
        Driver(library="libabsent.so")
    monkeypatch.setenv("STAND_IN_NO_GPU", "1")
    with pytest.raises(DriverMissingError, match=r"GPU 0 is not there: cuInit failed: no device \(100\)"):
        Driver(library=own_libcuda)
