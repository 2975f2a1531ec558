"""What a launcher asks of the CUDA driver for torch tensors, by the stand-in that writes it down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from exporter.cuda.kernel_cache import cache_folder, obtain_tactics
from exporter.cuda.launcher import Launcher, default_tactic
from exporter.errors import EnvironmentLacksError
from plugins.kernels.driver import Driver
from plugins.kernels.hardware import Capability
from plugins.kernels.library import LibraryKernel
from plugins.norm_quantize.descriptor import NormQuantize
from plugins.packed_linear.descriptor import PackedLinear
from plugins.tensorrt_plugins.variant import PluginVariant
from plugins.token_quantize.descriptor import TokenQuantize

QUANTIZER = TokenQuantize("e2m3", "int8", "fp32", 32)
HOPPER = (9, 0)


def kernels_without_code(variant: PluginVariant, capability: Capability) -> tuple[LibraryKernel, ...]:
    """The operator's tactics, with PTX that has their parameters and nothing else."""
    kernels = []
    for tactic, spec in enumerate(variant.kernels(capability)):
        types = ["u64"] * len(spec.inputs) + ["u32"] * len(spec.scalars) + ["u64"] * len(spec.outputs)
        parameters = ", ".join(f".param .{kind} p{index}" for index, kind in enumerate(types))
        kernels.append(
            LibraryKernel(
                variant.op_type,
                tactic,
                capability,
                spec.name,
                spec.inputs,
                spec.scalars,
                spec.outputs,
                spec.launch,
                0,
                85,
                f".entry {spec.name}({parameters})",
            )
        )
    return tuple(kernels)


@pytest.fixture
def launcher(libcuda: str) -> Iterator[Launcher]:
    with Driver(library=libcuda) as driver:
        yield Launcher(driver, kernels_without_code)


def launches(folder: Path) -> list[str]:
    return [line for line in (folder / "record").read_text().splitlines() if line.startswith("launch")]


def test_outputs_have_the_operators_types_and_shapes(launcher: Launcher, tmp_path: Path) -> None:
    x = torch.zeros(2, 5, 32)
    numbers, scales = launcher.run(QUANTIZER, [x], stream=0x77)
    assert (numbers.dtype, numbers.shape) == (torch.int8, (2, 5, 32))
    assert (scales.dtype, scales.shape) == (torch.float32, (2, 5, 1))
    [launch] = launches(tmp_path)
    addresses = f"{x.data_ptr():x} a {numbers.data_ptr():x} {scales.data_ptr():x}"
    assert launch.endswith(f"stream 77 extra 0 arguments {addresses}")
    assert "grid 10 1 1" in launch


def test_modulation_rows_tell_how_many_tokens_share_one(launcher: Launcher, tmp_path: Path) -> None:
    norm = NormQuantize("e4m3", "fp8", "bf16", 32)
    x = torch.zeros(3, 4, 32, dtype=torch.bfloat16)
    modulation = torch.zeros(3, 1, 32, dtype=torch.bfloat16)
    numbers, _ = launcher.run(norm, [x, modulation, modulation], stream=0)
    assert numbers.dtype == torch.float8_e4m3fn
    assert f"{modulation.data_ptr():x} c 4 {numbers.data_ptr():x}" in launches(tmp_path)[0]


def test_a_kernel_is_loaded_once(launcher: Launcher, tmp_path: Path) -> None:
    for _ in range(3):
        launcher.run(QUANTIZER, [torch.zeros(4, 32)], stream=0)
    lines = (tmp_path / "record").read_text().splitlines()
    assert sum(line.startswith("function") for line in lines) == 1
    assert len(launches(tmp_path)) == 3


def test_nothing_is_launched_without_tokens(launcher: Launcher, tmp_path: Path) -> None:
    numbers, _ = launcher.run(QUANTIZER, [torch.zeros(0, 32)], stream=0)
    assert numbers.shape == (0, 32)
    assert not launches(tmp_path)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 32, dtype=torch.float16), "x must be contiguous torch.float32"),
        (torch.zeros(32, 4).T, "x must be contiguous"),
        (torch.zeros(129)[1:].view(4, 32), "x must lie at a multiple of 16 bytes"),
    ],
)
def test_tensors_that_the_kernel_would_misread_are_refused(launcher: Launcher, x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launcher.run(QUANTIZER, [x], stream=0)


@pytest.mark.parametrize("capability", [(8, 7), (9, 0), (12, 0)])
def test_few_tokens_get_small_tiles(capability: Capability) -> None:
    kernels = kernels_without_code(PackedLinear("e2m1", "int8", "fp16", 1152, 1152), capability)
    tokens = {rows: kernels[default_tactic(kernels, rows)].launch.rows_per_program for rows in (1, 16, 17, 65, 8192)}
    assert tokens == {1: 16, 16: 16, 17: 32, 65: 128, 8192: kernels[0].launch.rows_per_program}
    assert default_tactic(kernels, 2048) == 0
    assert default_tactic(kernels_without_code(QUANTIZER, capability), 1) == 0


def test_kernels_are_compiled_once_and_read_from_disk_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = obtain_tactics(QUANTIZER, HOPPER, tmp_path / "cache")
    monkeypatch.setattr("exporter.cuda.kernel_cache.compile_library", None)
    assert obtain_tactics(QUANTIZER, HOPPER, tmp_path / "cache") == made


def test_a_damaged_kernel_is_compiled_anew(tmp_path: Path) -> None:
    made = obtain_tactics(QUANTIZER, HOPPER, tmp_path)
    [ptx] = tmp_path.glob(f"*/{made[0].entry}.ptx")
    ptx.write_text("damaged")
    assert obtain_tactics(QUANTIZER, HOPPER, tmp_path) == made
    assert ptx.read_text() == made[0].ptx


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentLacksError, match="set FP4EXPORT_CACHE"):
        obtain_tactics(QUANTIZER, HOPPER, tmp_path / "file" / "cache")


def test_where_kernels_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FP4EXPORT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/fp4export/kernels")
    monkeypatch.setenv("FP4EXPORT_CACHE", "/elsewhere")
    assert cache_folder() == Path("/elsewhere")
