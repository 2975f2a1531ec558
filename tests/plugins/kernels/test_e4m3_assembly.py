"""The inline assembly that makes E4M3 bytes, evaluated line by line with a model of each of its instructions."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from plugins.formats import get_format
from tests.plugins.token_quantize.rows import turning_points

triton = pytest.importorskip("triton", reason="Triton is not installed")


def converted(high: npt.NDArray[np.float32], low: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """cvt.rn.satfinite.e4m3x2.f32: the first operand in the upper byte, rounded to nearest, saturating at 448."""
    halves = [np.clip(half, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8) for half in (high, low)]
    return halves[0].astype(np.uint32) << 8 | halves[1]


def evaluate(text: str, floats: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.uint32]:
    registers: dict[str, npt.NDArray[np.generic]] = {f"${index + 1}": value for index, value in enumerate(floats)}
    for line in text.strip("{}\n").splitlines():
        if line.startswith(".reg"):
            continue
        name, target, operands = re.fullmatch(r"([a-z0-9.]+) (\S+), (.+);", line).groups()
        values = [
            np.uint32(int(item, 16)) if item.startswith("0x") else registers[item]
            for item in operands.strip("{}").split(", ")
        ]
        model = {
            "cvt.rn.satfinite.e4m3x2.f32": converted,
            "mov.b32": lambda low, high: low | high << np.uint32(16),
            "and.b32": np.bitwise_and,
            "or.b32": np.bitwise_or,
            "add.u32": np.add,
        }[name]
        registers[target] = model(*values)
    return registers["$0"]


def test_four_floats_become_four_bytes_without_negative_zeros() -> None:
    from plugins.kernels.device_rounding import TO_E4M3

    fmt = get_format("e4m3")
    numbers = np.concatenate([turning_points(fmt), np.random.default_rng(0).normal(0, 60, 4096).astype(np.float32)])
    numbers = np.concatenate([numbers, np.zeros(-len(numbers) % 4, np.float32)])
    for shift in range(4):
        rows = np.roll(numbers, shift).reshape(-1, 4)
        word = evaluate(TO_E4M3.value, list(rows.T.copy()))
        octets = word.astype("<u4").view(np.uint8).reshape(-1, 4)
        expected = (fmt.round(rows) + np.float32(0)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        assert np.array_equal(octets, expected)
        assert not (octets == 0x80).any()
