"""The machine that a benchmark ran on, in words."""

from __future__ import annotations

import platform
from pathlib import Path

import psutil

GB = 1e9


def processor() -> str:
    """The processor and the instructions that matter to integer products."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(facts.get("flags", "").split())
    vnni = "AVX-512 VNNI" if "avx512_vnni" in flags else "AVX VNNI" if "avx_vnni" in flags else "no VNNI"
    return f"{facts.get('model name', platform.processor())} ({platform.machine()}, {vnni})"


def machine() -> str:
    """Processor, cores and memory."""
    return f"{processor()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / GB:.0f} GB of memory"
