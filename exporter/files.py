"""Files that are either whole or absent: written under another name in the same folder, then renamed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporter.errors import InputError

_CHUNK = 1 << 20
# What `atomic_path` calls a file while it is being written, and what others put beside it under that name.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp(\..+)?")


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a path beside `path`, with the same suffix, for the body to write; then rename it to `path`.

    Whatever ends the body early (an error, Ctrl-C), nothing is left behind and an older `path` stays.

    Raises:
        InputError: the folder does not exist, or writing failed (disk full, read-only, no permission).
    """
    final = Path(path)
    check_parent(final)
    temporary = final.with_name(f".{final.stem}.{uuid.uuid4().hex[:8]}.tmp{final.suffix}")
    try:
        yield temporary
        _open_to_others(temporary)
        os.replace(temporary, final)
    except OSError as error:
        # Copying names the source first; an error about any other file is not ours to explain.
        if error.filename is not None and str(temporary) not in (error.filename, error.filename2):
            raise
        raise InputError(f"{final}: cannot be written: {error.strerror or error}") from error
    finally:
        _remove(temporary)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent`, for files that the body alone needs; it is removed whatever ends the body."""
    # Named as `remove_leftovers` expects it of a killed process.
    folder = parent / f".scratch.{uuid.uuid4().hex[:8]}.tmp"
    folder.mkdir()
    try:
        yield folder
    finally:
        _remove(folder)


def check_parent(path: Path) -> None:
    """Raise `InputError` unless the folder that `path` is to be written in exists."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder does not exist; make it first: mkdir -p {path.parent}")


def refuse_file(folder: Path, wanted: str) -> None:
    """Raise `InputError`, which asks for what is `wanted`, where `folder` or what it is to be made in is a file."""
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise InputError(f"{place}: is a file; give {wanted}")


def _open_to_others(path: Path) -> None:
    """Give a file the rights that a newly opened one has; safetensors writes files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    if path.is_file():
        path.chmod(0o666 & ~mask)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what `atomic_path` was writing, and scratch folders, anywhere below `folder` when a process was killed."""
    for path in [path for path in folder.rglob(".*") if _TEMPORARY.fullmatch(path.name)]:
        _remove(path)


def write_text_atomically(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_of(path: Path | str) -> str:
    """The file's SHA-256 in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
