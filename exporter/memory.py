"""Memory: how much there is, and giving back what is not needed any more, or not now."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from exporter.gpu import available_memory

_MAPS, _SMAPS = Path("/proc/self/maps"), Path("/proc/self/smaps")
# Bytes of mapped files below which releasing them is not worth the kernel's walk over all pages for its account.
_LEAST_MAPPED = 1 << 25
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ +(/.*\.safetensors)")
_DONT_NEED = 4
_CGROUP = Path("/sys/fs/cgroup")


def usable_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes of memory that this process can still get: what the machine has free, or its container."""
    free = available_memory()
    if free is None:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit, used = ((cgroup / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        return max(0, min(free, int(limit) - int(used)))
    except (OSError, ValueError):
        # No container, or one without a limit ("max").
        return free


def return_freed_memory() -> None:
    """Let glibc give back what was freed: it keeps small pieces, of which a large model frees thousands."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def release_mapped_weights() -> None:
    """Let go of the pages of mapped safetensors files; whatever reads them again finds them in the file.

    Only of mappings without a single changed page, by the kernel's own account, so that nothing can be lost. Files of
    less than 32 MiB together are left alone.
    """
    if sys.platform != "linux" or not _SMAPS.is_file() or _mapped_bytes() < _LEAST_MAPPED:
        return
    libc = ctypes.CDLL(None)
    for start, end in _clean_mappings(_SMAPS.read_text(encoding="utf-8", errors="replace")):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONT_NEED)


def _mapped_bytes() -> int:
    """Bytes of all mapped safetensors files."""
    found = map(_MAPPING.match, _MAPS.read_text(encoding="utf-8", errors="replace").splitlines())
    return sum(int(mapping[2], 16) - int(mapping[1], 16) for mapping in found if mapping)


def _clean_mappings(smaps: str) -> Iterator[tuple[int, int]]:
    """(start, end) of the mapped safetensors files of which no page was changed."""
    found: tuple[int, int] | None = None
    for line in smaps.splitlines():
        mapping = _MAPPING.match(line)
        if mapping:
            found = int(mapping[1], 16), int(mapping[2], 16)
        elif line[:1] in "0123456789abcdef":
            found = None
        elif found and line.startswith("Anonymous:"):
            # A changed page of a private mapping is the process's own: anonymous.
            if line.split()[1] == "0":
                yield found
            found = None
