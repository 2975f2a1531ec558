"""Numbers of bytes, in words and from words."""

from __future__ import annotations

_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_FACTORS = (("k", 1 << 10), ("m", 1 << 20), ("g", 1 << 30))


def size(count: int) -> str:
    """Bytes in words: ``1.50 GiB``."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} B"


def parse_size(text: str) -> int | None:
    """Bytes of ``512M``, ``2G`` or ``1.5GiB``; None for what is no positive size."""
    lowered = text.strip().lower().removesuffix("b").removesuffix("i")
    factor = dict(_FACTORS).get(lowered[-1:], 0)
    number = lowered[:-1]
    if not factor or not number.replace(".", "", 1).isdecimal() or not number.isascii():
        return None
    return int(float(number) * factor) or None
