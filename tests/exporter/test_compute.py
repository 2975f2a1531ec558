"""Compute types: what they hold, and which target has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporter.cli import main
from exporter.compute import COMPUTE_TYPES, check_compute, product_type
from exporter.errors import InputError
from exporter.recipe import load_recipe
from exporter.targets import TARGETS


def test_facts_are_the_formats() -> None:
    facts = {name: (one.bytes, one.largest, one.smallest_normal) for name, one in COMPUTE_TYPES.items()}
    assert facts["fp16"] == (2, 65504.0, 2.0**-14)
    assert facts["bf16"] == (2, (2 - 2.0**-7) * 2.0**127, 2.0**-126)
    assert facts["fp32"][0] == 4


def test_rounding_is_to_nearest_even_and_overflows_to_infinity() -> None:
    fp16, bf16 = COMPUTE_TYPES["fp16"], COMPUTE_TYPES["bf16"]
    assert fp16.rounded(np.array([1 + 2**-11, 1 + 3 * 2**-11, 65519, 65520])).tolist() == [1, 1 + 2**-9, 65504, np.inf]
    assert bf16.rounded(np.array([1 + 2**-8, 1 + 3 * 2**-8, -10000])).tolist() == [1, 1 + 2**-6, -9984]


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_but_the_cpu_computes_in_fp16(target: str) -> None:
    if target != "rtx-sm75":
        check_compute("r", "fp32", TARGETS[target])
    if target != "cpu":
        check_compute("r", "fp16", TARGETS[target])
        return
    with pytest.raises(InputError, match=r"^r: compute: fp16: ONNX Runtime's CPU .*target cpu takes fp32"):
        check_compute("r", "fp16", TARGETS[target])


def test_turing_has_no_fp32_products() -> None:
    with pytest.raises(InputError, match=r"^r: compute: fp32: TensorRT-RTX builds no .*rtx-sm75; use `compute: fp16`$"):
        check_compute("r", "fp32", TARGETS["rtx-sm75"])
    assert [name for name, target in TARGETS.items() if product_type(target) == "fp16"] == ["rtx-sm75"]


def test_rounding_changes_a_number_by_no_more_than_it_says() -> None:
    for compute in ("fp16", "bf16"):
        kind = COMPUTE_TYPES[compute]
        numbers = np.linspace(1, 4, 100_001, dtype=np.float32)
        errors = np.abs(kind.rounded(numbers) - numbers) / numbers
        assert 0.99 * kind.relative_error < errors.max() <= kind.relative_error


def test_bf16_begins_with_compute_capability_8() -> None:
    with pytest.raises(InputError, match=r"bf16: target rtx-sm75 has no BF16.*use fp16, or.*rtx-sm80") as caught:
        check_compute("r", "bf16", TARGETS["rtx-sm75"])
    assert "rtx-sm75," not in str(caught.value)
    for name in ("rtx-sm80", "orin", "h100", "thor"):
        check_compute("r", "bf16", TARGETS[name])


@pytest.mark.parametrize("dry", [True, False])
def test_the_command_refuses_before_any_work(
    tiny_job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: bool
) -> None:
    command = [str(tiny_job / "tiny.yaml"), "-o", str(tmp_path / "x.onnx"), "--set", "compute=bf16"]
    assert main(command + ["--dry-run"] * dry) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "compute: bf16: ONNX Runtime" in error
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_type_names_the_nearest(tiny_job: Path) -> None:
    assert load_recipe(tiny_job / "tiny.yaml").compute == "fp32"
    with pytest.raises(InputError, match="unknown compute 'bf61'; did you mean 'bf16'"):
        load_recipe(tiny_job / "tiny.yaml", ["compute=bf61"])


def test_the_dry_run_says_it_and_counts_half_the_bytes(tiny_job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(tiny_job / "tiny.yaml"), "-o", str(tiny_job / "x.plan"), "--dry-run", "--set"]
    assert main([*command, "compute=fp32"]) == 0
    full = capsys.readouterr().out
    assert main([*command, "compute=fp16"]) == 0
    half = capsys.readouterr().out
    assert "compute fp32" in full
    assert "compute fp16" in half
    whole_size, half_size = (
        next(line for line in said.splitlines() if line.startswith("size ")) for said in (full, half)
    )
    assert whole_size != half_size
