"""PTX as text: what is changed in Triton's, and what ptxas says of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
"""Names of kernels: identifiers in PTX, and safe as names of files."""

_ENTRY = re.compile(r"\.visible \.entry (?P<name>\w+)\((?P<parameters>[^)]*)\)")
_PARAMETER = re.compile(r"\.param\s[^,]*?\b(?P<name>\w+)\s*$")
_THREADS = re.compile(r"^\.reqntid (\d+)(?:, 1, 1)?\s*$", re.MULTILINE)
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SCRATCH_POINTERS = 2

Found = TypeVar("Found")


class PtxError(ValueError):
    """PTX that is not what the compiler promised."""


@dataclass(frozen=True)
class Resources:
    """What one thread needs, as ptxas counts it. Spills are bytes of code's loads and stores."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


def finish(ptx: str, name: str, parameters: int, threads: int) -> str:
    """Triton's PTX with its only kernel called `name` and without Triton's two trailing scratch pointers.

    `parameters` and `threads` are how many arguments and threads the kernel must have when done. Raises PtxError if
    it has not, or if the code reads a scratch pointer.
    """
    entry = _only(_ENTRY.findall(ptx), "entry")[0]
    renamed = re.sub(rf"\b{re.escape(entry)}(?=\b|_param_\d+\b)", name, ptx)
    found = _ENTRY.search(renamed)
    if found is None:
        raise PtxError(f"{name}: the entry cannot be renamed")
    declared = [line.strip() for line in found["parameters"].split(",") if line.strip()]
    if len(declared) != parameters + _SCRATCH_POINTERS:
        raise PtxError(f"{name}: {len(declared)} parameters with the two scratch pointers, not {parameters + 2}")
    for line in declared[parameters:]:
        scratch = _PARAMETER.search(line)
        if scratch is None or ".u64 .ptr .global" not in line:
            raise PtxError(f"{name}: {line!r} is no scratch pointer")
        if len(re.findall(rf"\b{scratch['name']}\b", renamed)) != 1:
            raise PtxError(f"{name}: the code reads the scratch pointer {scratch['name']}")
    counts = [int(count) for count in _THREADS.findall(renamed)]
    if counts != [threads]:
        raise PtxError(f"{name}: compiled for {counts} threads, to be launched with {threads}")
    start, end = found.span("parameters")
    kept = ",\n\t".join(declared[:parameters])
    return f"{renamed[:start]}\n\t{kept}\n{renamed[end:]}"


def parse_resources(log: str) -> Resources:
    """The figures in what ``ptxas -v`` printed about one kernel. Raises PtxError if they are not there."""
    stack, stores, loads = (int(count) for count in _only(_STACK.findall(log), "line about the stack"))
    return Resources(int(_only(_REGISTERS.findall(log), "count of registers")), stack, stores, loads)


def _only(found: list[Found], what: str) -> Found:
    if len(found) != 1:
        raise PtxError(f"one {what} was expected, {len(found)} found")
    return found[0]
