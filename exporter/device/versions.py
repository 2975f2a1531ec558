"""The Python packages of TensorRT and TensorRT-RTX, and their versions."""

from __future__ import annotations

import importlib
import re
from typing import Any


def module_name(*, rtx: bool) -> str:
    """The Python package of TensorRT or of TensorRT-RTX."""
    return "tensorrt_rtx" if rtx else "tensorrt"


def load_module(*, rtx: bool) -> Any:
    """Import TensorRT or TensorRT-RTX. Raises `ImportError`."""
    return importlib.import_module(module_name(rtx=rtx))


def version_of(text: str) -> tuple[int, int]:
    """(major, minor) of a version such as ``10.3.0.26``; (0, 0) for one of another form."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
