"""An evaluator of the few PTX instructions that the kernels' inline assembly uses, on arrays of 32-bit registers.

Semantics after the PTX ISA. An instruction or operand that is not known is an error, so that nothing is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import numpy.typing as npt

Register = npt.NDArray[np.uint32]

_LINE = re.compile(r"(?P<name>[a-z][a-z0-9.]*) (?P<operands>[^;]+);")
_IMMEDIATE = re.compile(r"0x[0-9a-f]+|\d+")


def run_ptx(text: str, outputs: int, inputs: Sequence[Register]) -> list[Register]:
    """The output registers $0 … of one inline assembly text, whose inputs are the registers that follow.

    Raises ValueError for what is not one of `_INSTRUCTIONS`, AssertionError for a register that is read before it is
    written, or never declared.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert (lines[0], lines[-1]) == ("{", "}"), "a scope of its own, so that names do not clash"
    declared: set[str] = set()
    registers = {f"${outputs + index}": np.asarray(value, np.uint32) for index, value in enumerate(inputs)}
    for line in lines[1:-1]:
        if line.startswith(".reg .b32 "):
            declared |= set(line.removeprefix(".reg .b32 ").removesuffix(";").split(", "))
            continue
        match = _LINE.fullmatch(line)
        if match is None or match["name"] not in _INSTRUCTIONS:
            raise ValueError(f"no model of {line!r}")
        target, *operands = match["operands"].split(", ")
        assert target in declared or target in {f"${index}" for index in range(outputs)}, line
        assert match["name"] not in _REGISTERS_ONLY or not any(map(_IMMEDIATE.fullmatch, operands)), line
        registers[target] = _INSTRUCTIONS[match["name"]](*(_operand(item, registers) for item in operands))
    return [registers[f"${index}"] for index in range(outputs)]


def _operand(text: str, registers: dict[str, Register]) -> Register:
    if _IMMEDIATE.fullmatch(text):
        return np.asarray(int(text, 0), np.uint32)
    assert text in registers, f"{text} is read before it is written"
    return registers[text]


def _prmt(a: Register, b: Register, selector: Register) -> Register:
    """Byte i is the one that the selector's nibble i picks of b:a, or its sign bit if the nibble's top bit is set."""
    pool = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint32)
    for place in range(4):
        control = (selector >> np.uint32(4 * place)) & np.uint32(15)
        octet = ((pool >> (8 * (control & 7)).astype(np.uint64)) & np.uint64(0xFF)).astype(np.uint32)
        octet = np.where(control & 8, np.where(octet & 0x80, 0xFF, 0), octet).astype(np.uint32)
        result |= octet << np.uint32(8 * place)
    return result


def _shift(a: Register, amount: Register, left: bool) -> Register:
    wide = a.astype(np.uint64)
    clamped = np.minimum(amount, 32).astype(np.uint64)
    return ((wide << clamped if left else wide >> clamped) & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def _fma_bf16x2(a: Register, b: Register, c: Register) -> Register:
    """Each half a·b + c, rounded once; subnormal numbers are kept."""
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for place in (0, 16):
        first, second, third = (_bf16(register, place) for register in (a, b, c))
        rounded = (first * second + third).astype(ml_dtypes.bfloat16)
        result |= rounded.view(np.uint16).astype(np.uint32) << np.uint32(place)
    return result


def _bf16(register: Register, place: int) -> npt.NDArray[np.float64]:
    half = np.atleast_1d(((register >> np.uint32(place)) & np.uint32(0xFFFF)).astype(np.uint16))
    return half.view(ml_dtypes.bfloat16).astype(np.float64).reshape(register.shape)


_REGISTERS_ONLY = ("fma.rn.bf16x2",)

_INSTRUCTIONS: dict[str, Callable[..., Register]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "not.b32": lambda a: ~a,
    "shl.b32": lambda a, amount: _shift(a, amount, left=True),
    "shr.u32": lambda a, amount: _shift(a, amount, left=False),
    "add.u32": lambda a, b: a + b,
    "mul.lo.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": _prmt,
    "fma.rn.bf16x2": _fma_bf16x2,
}
