"""safetensors files that are either whole or absent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from exporter.errors import InputError
from exporter.files import atomic_path


@contextmanager
def atomic_tensor_path(path: Path | str) -> Iterator[Path]:
    """`atomic_path` for a body that writes with safetensors, whose errors (disk full, …) become `InputError`, too."""
    try:
        with atomic_path(path) as temporary:
            yield temporary
    except SafetensorError as error:
        raise InputError(f"{path}: cannot be written: {error}") from error
