"""Names of files in a bundle: what keeps every one of them inside its folder, on any file system."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from exporter.errors import InputError

LONGEST_PATH = 240
DEEPEST = 8

_RESERVED = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\]')


def check_path(path: str, where: str) -> str:
    """Return `path` if it is a plain relative path with slashes, as on any file system; else raise `InputError`."""
    parts = path.split("/")
    if not path or len(path) > LONGEST_PATH or len(parts) > DEEPEST:
        raise InputError(f"{where}: a path must have 1 to {LONGEST_PATH} characters in at most {DEEPEST} parts")
    if path.startswith("/") or ".." in parts:
        raise InputError(f"{where}: {path!r} leads out of the bundle; nothing was read from it")
    if "" in parts or "." in parts or _RESERVED.search(path) or any(part[-1] in " ." for part in parts):
        raise InputError(f"{where}: {path!r} is not a plain relative path")
    return path


def check_distinct(paths: Iterable[str], where: str) -> None:
    """Raise `InputError` for paths that some file system takes for the same, and for a file that is a folder, too."""
    seen: dict[str, str] = {}
    for path in paths:
        other = seen.setdefault(_folded(path), path)
        if other is not path:
            raise InputError(f"{where}: {path!r} and {other!r} are the same file on some file systems")
    for folded, path in seen.items():
        for folder in _folders(folded):
            if folder in seen:
                raise InputError(f"{where}: {seen[folder]!r} is a file, and the folder of {path!r} as well")


def _folders(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKC", path).casefold())
