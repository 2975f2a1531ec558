"""The work folder: finished stages kept beside the output, each under the hash of all that it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

from exporter.errors import EnvironmentLacksError, InputError
from exporter.files import remove_leftovers, write_text_atomically
from exporter.onnx_files import checksum_of, rename_data
from exporter.tensor_files import atomic_tensor_path

QUANTIZED = "quantized"
"""What names of files with calibrated weights begin with."""

UNFINISHED = "unfinished"
"""What names of folders with the units of a calibration that is under way begin with."""

_LIBRARIES = ("torch", "diffusers", "onnx", "onnxscript", "numpy")
_NAME_DIGITS = 8
_LOCK = "lock"


def key_of(**parts: object) -> str:
    """Hash of everything a stage depends on: its parts, which must be JSON values, and the program itself."""
    text = json.dumps({"program": program_identity(), **parts}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def name_for(stem: str, suffix: str, parts: object) -> str:
    """Name of a file that targets or recipes may need in different versions: with a short hash of `parts`, JSON values.

    So one's file does not replace another's, and another version of this program replaces its own.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return f"{stem}.{hashlib.sha256(text.encode()).hexdigest()[:_NAME_DIGITS]}{suffix}"


def verb(reused: bool, done: str) -> str:
    """What a note says was done, now or by an earlier run."""
    return f"{done} earlier:" if reused else done


@cache
def program_identity() -> str:
    """Hash of this program's own source and of the versions of the libraries that decide what it writes."""
    digest = hashlib.sha256(json.dumps({name: version(name) for name in _LIBRARIES}).encode())
    root = Path(__file__).resolve().parents[1]
    for file in sorted(file for package in ("exporter", "plugins") for file in (root / package).rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class WorkDir:
    """A folder of sealed files.

    Beside a sealed file `NAME` stands `NAME.seal`: JSON with the stage's key and the file's SHA-256. `fresh` makes
    every stage run again, once.
    """

    path: Path
    fresh: bool = False
    _sealed: set[Path] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path, *, fresh: bool = False) -> WorkDir:
        """Create the folder if need be; raises `OSError` where that cannot be done."""
        path.mkdir(exist_ok=True)
        return cls(path, fresh)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Have the folder to oneself. What a killed run was still writing is removed.

        The lock ends with the process, however that ends. Raises `InputError` where another process has it, or where
        the file system has no locks, and `EnvironmentLacksError` where the system has none.
        """
        try:
            import fcntl
        except ModuleNotFoundError as error:
            system = platform.system()
            raise EnvironmentLacksError(
                f"{self.path}: cannot be locked: {system} has no file locks that end with their process; "
                "export on Linux or macOS"
            ) from error
        with self.file(_LOCK).open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise InputError(
                    f"{self.path}: {holder} is working in this folder: wait for it, or take another one with --work-dir"
                ) from error
            except OSError as error:
                raise InputError(
                    f"{self.path}: cannot be locked: {error.strerror}; take a folder on another disk with --work-dir"
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
            remove_leftovers(self.path)
            yield

    def file(self, name: str) -> Path:
        """Path of `name` in the folder."""
        return self.path / name

    def obtain(self, name: str, key: str, make: Callable[[Path], None]) -> tuple[Path, bool]:
        """Path of `name` made under `key`, and whether it was reused.

        An earlier file is reused when its seal carries the same key and the file's checksum still holds; else
        `make(temporary_path)` writes it anew, a large ONNX graph with a second file for its weights
        (`exporter.onnx_files`).
        """
        path = self.file(name)
        if self.is_current(path, key):
            return path, True
        with atomic_tensor_path(path) as temporary:
            make(temporary)
            rename_data(temporary, path)
        self.seal(path, key)
        return path, False

    def is_current(self, path: Path, key: str) -> bool:
        """Whether the file is sealed under this key, is still what was sealed, and may be reused."""
        if self.fresh and path not in self._sealed:
            return False
        try:
            seal = json.loads(_seal(path).read_text(encoding="utf-8"))
            return isinstance(seal, dict) and seal.get("key") == key and seal.get("sha256") == checksum_of(path)
        except (OSError, ValueError):
            return False

    def seal(self, path: Path, key: str) -> None:
        """Note what a finished file was made under."""
        seal = {"key": key, "sha256": checksum_of(path)}
        write_text_atomically(_seal(path), json.dumps(seal, indent=1) + "\n")
        self._sealed.add(path)


def _seal(path: Path) -> Path:
    return path.with_name(path.name + ".seal")
