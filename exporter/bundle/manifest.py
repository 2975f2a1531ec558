"""manifest.json: what a bundle holds, for whom, and the checksum of every file, its own included.

The file has exactly one form: the one that `Manifest.to_json` writes. So a changed byte in it shows, whatever it says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from exporter.bundle.paths import check_distinct, check_path
from exporter.errors import InputError

MANIFEST = "manifest.json"
LARGEST_MANIFEST = 4 << 20
MOST_FILES = 10_000

_FORMAT = "fp4export.bundle"
_VERSION = 1
_SHA256_DIGITS = 64


@dataclass(frozen=True)
class FileEntry:
    """One file: its path in the bundle, its size and its SHA-256 in hexadecimal."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Acceptance:
    """Inputs and the torch reference's outputs as polygraphy reads them, the gate's verdict on the lowered graph, and
    the SNR in dB that is asked of an engine."""

    inputs: str
    reference: str
    verdict: str
    snr_db: float


@dataclass(frozen=True)
class TargetEntry:
    """What the bundle has for one target: paths of its graphs, the folder of its kernels (None without plugins) and
    its acceptance files (None for an export without validation)."""

    name: str
    engine: str
    compute_capability: tuple[int, int] | None
    compute: str
    exported: str
    lowered: str
    kernels: str | None
    acceptance: Acceptance | None


@dataclass(frozen=True)
class WeightsEntry:
    """The model that was exported: where from, its files' SHA-256, and its licence ("unknown" where nothing says it).

    `licence_from` names what said so, and `licence_file` is the copy of its text in the bundle; both None without.
    """

    source: str
    licence: str
    licence_from: str | None
    licence_file: str | None
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class Manifest:
    """Everything but the files themselves; `versions` are those of the packages that made the bundle."""

    name: str
    recipe: str
    weights: WeightsEntry
    versions: Mapping[str, str]
    targets: tuple[TargetEntry, ...]
    files: tuple[FileEntry, ...]

    @property
    def checksum(self) -> str:
        """SHA-256 over everything that the manifest says, so over the whole bundle."""
        return hashlib.sha256(_dump(self._document()).encode()).hexdigest()

    @property
    def sizes(self) -> dict[str, int]:
        """Path → size of every file."""
        return {file.path: file.bytes for file in self.files}

    def to_json(self) -> str:
        """The one text that stands for this manifest."""
        return _dump({**self._document(), "sha256": self.checksum}) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Read back what `to_json` wrote. Raises `InputError`, starting with `where`, for anything else."""
        try:
            document = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not the manifest of a bundle: {error}") from error
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise InputError(f"{where}: not the manifest of a bundle; expected one that fp4export wrote")
        if document.get("version") != _VERSION:
            raise InputError(
                f"{where}: version {document.get('version')!r:.40}, but this fp4export reads version {_VERSION}; "
                "install the version that wrote it"
            )
        manifest = _parse(_Reader(document, where))
        if manifest.to_json() != text:
            raise InputError(f"{where}: has changed since it was written; get the bundle again")
        return manifest

    def _document(self) -> dict[str, Any]:
        return {"format": _FORMAT, "version": _VERSION, **asdict(self)}


def _dump(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.60} is there twice")
    for key in result:
        if not key.isprintable():
            raise ValueError(f"the key {key!r:.60} is no text")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


@dataclass(frozen=True)
class _Reader:
    """An object of the document whose keys are asked for by type; `where` says which one it is."""

    values: dict[str, Any]
    where: str

    def only(self, *keys: str) -> None:
        """Raise `InputError` unless the object has exactly these keys."""
        for key in (*keys, *self.values):
            if key not in keys or key not in self.values:
                raise InputError(f"{self.where}: {key!r:.60} is {'unknown' if key in self.values else 'missing'}")

    def text(self, key: str) -> str:
        """A string that is not empty and that a terminal shows as it is."""
        value = self.values[key]
        if not isinstance(value, str) or not value or not value.isprintable():
            raise self._wrong(key, "text")
        return value

    def optional_text(self, key: str) -> str | None:
        """The same, or null."""
        return None if self.values[key] is None else self.text(key)

    def path(self, key: str) -> str:
        """A path inside the bundle."""
        return check_path(self.text(key), f"{self.where}.{key}")

    def optional_path(self, key: str) -> str | None:
        """The same, or null."""
        return None if self.values[key] is None else self.path(key)

    def count(self, key: str) -> int:
        """An integer that is not negative."""
        value = self.values[key]
        if type(value) is not int or value < 0:
            raise self._wrong(key, "an integer that is not negative")
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        value = self.values[key]
        if type(value) not in (int, float) or abs(value) > 1e9:
            raise self._wrong(key, "a number")
        return float(value)

    def sha256(self, key: str) -> str:
        """A SHA-256 in lower-case hexadecimal."""
        value = self.text(key)
        if len(value) != _SHA256_DIGITS or set(value) - set("0123456789abcdef"):
            raise self._wrong(key, "a SHA-256 in hexadecimal")
        return value

    def inside(self, key: str) -> _Reader:
        """The object under `key`."""
        value = self.values[key]
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return _Reader(value, f"{self.where}.{key}")

    def each(self, key: str) -> list[_Reader]:
        """The objects in the list under `key`."""
        value = self.values[key]
        if not isinstance(value, list) or not value or len(value) > MOST_FILES:
            raise self._wrong(key, f"a list of 1 to {MOST_FILES} objects")
        readers = [_Reader(one, f"{self.where}.{key}[{index}]") for index, one in enumerate(value)]
        if not all(isinstance(reader.values, dict) for reader in readers):
            raise self._wrong(key, "a list of objects")
        return readers

    def _wrong(self, key: str, wanted: str) -> InputError:
        return InputError(f"{self.where}.{key}: expected {wanted}, got {self.values[key]!r:.60}")


def _parse(document: _Reader) -> Manifest:
    document.only("format", "version", "name", "recipe", "weights", "versions", "targets", "files", "sha256")
    versions = document.inside("versions")
    files = tuple(_file(one) for one in document.each("files"))
    targets = tuple(_target(one) for one in document.each("targets"))
    weights = _weights(document.inside("weights"))
    paths = [MANIFEST, *(file.path for file in files)]
    check_distinct(paths, document.where)
    names = [target.name for target in targets]
    if len(set(names)) != len(names):
        raise InputError(f"{document.where}.targets: a target is there twice: {', '.join(names)}")
    manifest = Manifest(
        name=document.text("name"),
        recipe=document.path("recipe"),
        weights=weights,
        versions={name: versions.text(name) for name in versions.values},
        targets=targets,
        files=files,
    )
    _check_references(manifest, document.where)
    return manifest


def _file(one: _Reader) -> FileEntry:
    one.only("path", "bytes", "sha256")
    return FileEntry(one.path("path"), one.count("bytes"), one.sha256("sha256"))


def _weights(one: _Reader) -> WeightsEntry:
    one.only("source", "licence", "licence_from", "licence_file", "sha256")
    checksums = one.inside("sha256")
    return WeightsEntry(
        one.text("source"),
        one.text("licence"),
        one.optional_text("licence_from"),
        one.optional_path("licence_file"),
        {name: checksums.sha256(name) for name in checksums.values},
    )


def _target(one: _Reader) -> TargetEntry:
    one.only("name", "engine", "compute_capability", "compute", "exported", "lowered", "kernels", "acceptance")
    acceptance = None
    if one.values["acceptance"] is not None:
        part = one.inside("acceptance")
        part.only("inputs", "reference", "verdict", "snr_db")
        acceptance = Acceptance(
            part.path("inputs"), part.path("reference"), part.path("verdict"), part.number("snr_db")
        )
    return TargetEntry(
        name=one.text("name"),
        engine=one.text("engine"),
        compute_capability=_capability(one),
        compute=one.text("compute"),
        exported=one.path("exported"),
        lowered=one.path("lowered"),
        kernels=one.optional_path("kernels"),
        acceptance=acceptance,
    )


def _capability(one: _Reader) -> tuple[int, int] | None:
    value = one.values["compute_capability"]
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or any(type(part) is not int for part in value):
        raise InputError(f"{one.where}.compute_capability: expected two integers or null, got {value!r:.60}")
    return value[0], value[1]


def _check_references(manifest: Manifest, where: str) -> None:
    """Raise `InputError` for a path that the manifest speaks of and does not list."""
    listed = manifest.sizes.keys()
    wanted = [manifest.recipe, manifest.weights.licence_file]
    for target in manifest.targets:
        wanted += [target.exported, target.lowered]
        if target.acceptance is not None:
            wanted += [target.acceptance.inputs, target.acceptance.reference, target.acceptance.verdict]
        if target.kernels is not None and not any(path.startswith(f"{target.kernels}/") for path in listed):
            raise InputError(f"{where}: target {target.name}: no file of {target.kernels} is listed")
    for path in wanted:
        if path is not None and path not in listed:
            raise InputError(f"{where}: {path} is not among its files")
