"""Writing a bundle: put together under another name in the same folder, checked, then renamed as a whole."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporter.bundle.manifest import MANIFEST, FileEntry, Manifest
from exporter.bundle.read import open_bundle, unlisted_files
from exporter.errors import InputError
from exporter.files import sha256_of


def check_place(output: Path) -> None:
    """Raise `InputError` unless a bundle can be written to `output`: nothing, or nothing but a bundle, is there."""
    if not output.parent.is_dir():
        raise InputError(
            f"{output}: the folder {output.parent} does not exist; make it first: mkdir -p {output.parent}"
        )
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"{output}: the folder {output.parent} is not writable")
    if not output.exists() and not output.is_symlink():
        return
    if output.is_symlink() or not output.is_dir():
        raise InputError(f"{output}: is a {'link' if output.is_symlink() else 'file'}; give the bundle another name")
    if not any(output.iterdir()):
        return
    try:
        others = unlisted_files(output)
    except InputError as error:
        raise InputError(f"{output}: is a folder and no bundle, so it is not replaced; give another name") from error
    if others:
        raise InputError(f"{output}: would be replaced, but holds what is not part of it: {others[0]}; move it away")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder beside `output` for the body to fill; then put it in the place of `output`.

    Whatever ends the body early, an older `output` stays as it was and nothing is left behind. `output` is at no time
    half-written: it is the old folder, then for the blink between two renames absent, then the new one.
    """
    token = uuid.uuid4().hex[:8]
    temporary, old = (output.with_name(f".{output.stem}.{token}.{kind}{output.suffix}") for kind in ("tmp", "old"))
    temporary.mkdir()
    try:
        yield temporary
        _replace(temporary, output, old)
    finally:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


def _replace(temporary: Path, output: Path, old: Path) -> None:
    check_place(output)
    existed = output.exists()
    if existed:
        os.rename(output, old)
    replaced = False
    try:
        os.rename(temporary, output)
        replaced = True
    finally:
        if existed and not replaced:
            os.rename(old, output)


def copy_file(source: Path, folder: Path, name: str) -> None:
    """Copy a file to `name` in the bundle's folder, readable by all. Raises `InputError` where it cannot be written."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise InputError(f"{error.filename2 or error.filename}: cannot be copied: {error.strerror}") from error


def listed_files(folder: Path) -> tuple[FileEntry, ...]:
    """Every file in `folder` but the manifest, with its size and SHA-256, by path."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return tuple(
        FileEntry(name, path.stat().st_size, sha256_of(path))
        for name, path in sorted(files.items())
        if name != MANIFEST
    )


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest and read the whole bundle back. Raises `InputError` where a reader would."""
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return open_bundle(folder).manifest
