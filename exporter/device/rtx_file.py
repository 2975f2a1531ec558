"""The header of a TensorRT-RTX engine, all of it that can be checked without its GPU."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import InputError

_MAGIC = b"vtrt"
# Magic, version, size of the whole file; little-endian 64-bit numbers after four bytes each of magic and padding.
_HEADER = struct.Struct("<4s4xQQ")


@dataclass(frozen=True)
class RtxHeader:
    """What the first bytes of a TensorRT-RTX engine say: their own version, and the size of the whole file."""

    version: int
    stated_bytes: int


def read_rtx_header(path: Path) -> RtxHeader | None:
    """The engine's header, None for a file that does not start with one."""
    with path.open("rb") as file:
        start = file.read(_HEADER.size)
    if len(start) < _HEADER.size or start[:4] != _MAGIC:
        return None
    _, version, stated = _HEADER.unpack(start)
    return RtxHeader(version, stated)


def check_rtx_engine(path: Path) -> None:
    """Raise `InputError` unless the file starts as a whole TensorRT-RTX engine does."""
    header = read_rtx_header(path)
    if header is None:
        raise InputError(f"{path}: not a TensorRT-RTX engine; build it again")
    size = path.stat().st_size
    if header.stated_bytes != size:
        raise InputError(
            f"{path}: a damaged TensorRT-RTX engine: {size} of {header.stated_bytes} bytes; build it again"
        )
