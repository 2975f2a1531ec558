"""Opening a bundle: every byte is checked before anything of it is used, and nothing of it is run.

Nothing is written, and nothing outside the folder is read: a symbolic link anywhere in it is refused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from exporter.bundle.external_data import check_external_data
from exporter.bundle.manifest import LARGEST_MANIFEST, MANIFEST, MOST_FILES, FileEntry, Manifest, TargetEntry
from exporter.bundle.paths import DEEPEST
from exporter.errors import InputError, did_you_mean
from exporter.files import sha256_of

_MOST_NAMED = 3


@dataclass(frozen=True)
class AcceptanceFiles:
    """Inputs and expected outputs as polygraphy reads them, and the least SNR in dB of an engine's output."""

    inputs: Path
    reference: Path
    snr_db: float


@dataclass(frozen=True)
class TargetFiles:
    """One target's verified files; `kernels` is None without plugins, `acceptance` for an export without validation."""

    entry: TargetEntry
    exported: Path
    lowered: Path
    kernels: Path | None
    acceptance: AcceptanceFiles | None


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are all there, are all that is there, and have the checksums of its manifest."""

    root: Path
    manifest: Manifest

    def target(self, name: str | None = None, compute_capability: tuple[int, int] | None = None) -> TargetFiles:
        """The files of the target called `name`, or else of the only one, or else of the first for a GPU of that
        capability.

        Raises `InputError` naming what there is.
        """
        targets = self.manifest.targets
        names = [target.name for target in targets]
        if name is not None:
            if name not in names:
                raise InputError(f"{self.root}: has nothing for target {name!r}{did_you_mean(name, names)}")
            return self._files(targets[names.index(name)])
        if len(targets) == 1:
            return self._files(targets[0])
        if compute_capability is not None:
            fitting = [target for target in targets if target.compute_capability == compute_capability]
            if not fitting:
                version = ".".join(map(str, compute_capability))
                raise InputError(
                    f"{self.root}: has nothing for a GPU with compute capability {version}, only for "
                    f"{', '.join(names)}; export it again with --target"
                )
            return self._files(fitting[0])
        raise InputError(f"{self.root}: holds several targets; choose with --target: {', '.join(names)}")

    def _files(self, entry: TargetEntry) -> TargetFiles:
        accepted = entry.acceptance
        return TargetFiles(
            entry,
            self.root / entry.exported,
            self.root / entry.lowered,
            None if entry.kernels is None else self.root / entry.kernels,
            None
            if accepted is None
            else AcceptanceFiles(self.root / accepted.inputs, self.root / accepted.reference, accepted.snr_db),
        )


def open_bundle(path: Path | str) -> Bundle:
    """Check a whole bundle and return it. Raises `InputError` naming the first file that is not as it should be."""
    root = Path(path)
    manifest = read_manifest(root)
    found = _walk(root)
    listed = {file.path: file for file in manifest.files}
    _check_names(root, found, {MANIFEST, *listed})
    for name, file in sorted(listed.items()):
        _check_file(root / name, file)
    graphs = {path for target in manifest.targets for path in (target.exported, target.lowered)}
    for name in sorted(graphs.union(name for name in listed if name.endswith(".onnx"))):
        check_external_data(root, name, manifest.sizes)
    return Bundle(root, manifest)


def read_manifest(root: Path) -> Manifest:
    """The manifest of the bundle in the folder `root`, whose files are not looked at. Raises `InputError`."""
    if not root.is_dir():
        missing = "is a file" if root.exists() else "no such folder"
        raise InputError(f"{root}: {missing}; a bundle is a folder that fp4export wrote (-o NAME.bundle)")
    file = root / MANIFEST
    if file.is_symlink() or not file.is_file():
        raise InputError(f"{root}: no bundle: it has no {MANIFEST}")
    if file.stat().st_size > LARGEST_MANIFEST:
        raise InputError(f"{file}: over {LARGEST_MANIFEST >> 20} MiB, so it is no bundle's manifest")
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not a JSON text file") from error
    return Manifest.from_json(text, str(file))


def _walk(root: Path) -> list[str]:
    """Paths of all files in the folder; a folder that nothing is in counts as one, with a slash behind it."""
    found: list[str] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(root / folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
        if folder and not inside:
            found.append(f"{folder}/")
        for entry in inside:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_symlink():
                raise InputError(f"{root / name}: is a symbolic link; a bundle has none, so it was not followed")
            if entry.is_dir(follow_symlinks=False):
                folders.append(name)
            elif entry.is_file(follow_symlinks=False):
                found.append(name)
            else:
                raise InputError(f"{root / name}: is neither a file nor a folder; it was not opened")
            if len(found) + len(folders) > MOST_FILES or name.count("/") > DEEPEST:
                raise InputError(f"{root}: holds too many or too deep folders for a bundle, such as {name}")
    return found


def _check_names(root: Path, found: list[str], listed: set[str]) -> None:
    extra, missing = sorted(set(found) - listed), sorted(listed - set(found))
    if missing:
        raise InputError(f"{root}: missing: {_named(missing)}; get the bundle again")
    if extra:
        raise InputError(f"{root}: not part of the bundle: {_named(extra)}; move it out of the folder")


def _named(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _check_file(path: Path, file: FileEntry) -> None:
    size = path.stat().st_size
    if size != file.bytes:
        raise InputError(f"{path}: {size} bytes, but {file.bytes} when it was written; get the bundle again")
    if sha256_of(path) != file.sha256:
        raise InputError(f"{path}: has changed since it was written (SHA-256 differs); get the bundle again")


def unlisted_files(root: Path) -> list[str]:
    """What lies in the bundle's folder and is not in its manifest. Raises `InputError`."""
    return sorted(set(_walk(root)) - {MANIFEST, *read_manifest(root).sizes})
