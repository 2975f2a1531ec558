"""Compiled kernels on disk: NAME.ptx for each, and kernels.json, which says what they are and holds their checksums.

Reading needs neither Triton nor torch: the machine that builds an engine has only numpy, onnx and TensorRT.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from plugins.kernels.hardware import Capability
from plugins.kernels.ptx import NAME
from plugins.kernels.spec import Launch, Pointer, Scalar

INDEX = "kernels.json"
FORMAT_VERSION = 1


class KernelLibraryError(ValueError):
    """A folder of kernels that cannot be read, trusted or written, or a kernel that it does not have."""


@dataclass(frozen=True)
class LibraryKernel:
    """One tactic of one operator for GPUs of one compute capability, ready to be loaded.

    Arguments of `entry` are `inputs`, `scalars` (int32) and `outputs`, in this order; `shared_bytes` is the dynamic
    shared memory of a launch, `ptx_version` the PTX ISA (85 is 8.5).
    """

    op_type: str
    tactic: int
    capability: Capability
    entry: str
    inputs: tuple[Pointer, ...]
    scalars: tuple[Scalar, ...]
    outputs: tuple[Pointer, ...]
    launch: Launch
    shared_bytes: int
    ptx_version: int
    ptx: str

    @cached_property
    def sha256(self) -> str:
        """Of the PTX."""
        return _sha256(self.ptx)


@dataclass(frozen=True)
class KernelLibrary:
    """Kernels by operator, compute capability and tactic; `compiler` says what made them."""

    kernels: tuple[LibraryKernel, ...]
    compiler: str

    def __post_init__(self) -> None:
        for kernel in self.kernels:
            if not NAME.fullmatch(kernel.entry):
                raise KernelLibraryError(f"{kernel.entry!r} cannot name a kernel; letters, digits and _ only")
        entries = [kernel.entry for kernel in self.kernels]
        places = [f"{kernel.op_type} {kernel.capability} {kernel.tactic}" for kernel in self.kernels]
        for what, count in (Counter(entries) + Counter(places)).items():
            if count > 1:
                raise KernelLibraryError(f"{count} kernels are {what}")

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """Of the GPUs that there are kernels for."""
        return tuple(sorted({kernel.capability for kernel in self.kernels}))

    def tactics(self, op_type: str, capability: Capability) -> tuple[LibraryKernel, ...]:
        """The operator's kernels, the best default first. Raises KernelLibraryError if there is none."""
        own = [kernel for kernel in self.kernels if kernel.op_type == op_type]
        found = [kernel for kernel in own if kernel.capability == capability]
        if not found:
            have = ", ".join(sorted({_dotted(kernel.capability) for kernel in own})) or "none"
            raise KernelLibraryError(
                f"no kernel of {op_type} for compute capability {_dotted(capability)} (there are for: {have}); "
                "export the model for this GPU's target"
            )
        return tuple(sorted(found, key=lambda kernel: kernel.tactic))

    def save(self, folder: Path | str) -> None:
        """Write the folder, whole or not at all; a library that was there is replaced.

        Raises KernelLibraryError if something else is there, or if it cannot be written.
        """
        final = Path(folder)
        if final.exists() and not (final / INDEX).is_file() and (not final.is_dir() or any(final.iterdir())):
            raise KernelLibraryError(f"{final}: is there and no folder of kernels; remove it or choose another name")
        token = uuid.uuid4().hex[:8]
        temporary, old = (final.with_name(f".{final.name}.{token}.{end}") for end in ("tmp", "old"))
        try:
            temporary.mkdir()
            for kernel in self.kernels:
                (temporary / f"{kernel.entry}.ptx").write_bytes(kernel.ptx.encode())
            (temporary / INDEX).write_text(self._index(), encoding="utf-8")
            if final.exists():
                os.replace(final, old)
            os.replace(temporary, final)
        except OSError as error:
            raise KernelLibraryError(f"{final}: cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if not final.exists() and old.exists():
                os.replace(old, final)
            shutil.rmtree(old, ignore_errors=True)

    def _index(self) -> str:
        content = {"compiler": self.compiler, "kernels": [_to_json(kernel) for kernel in self.kernels]}
        document = {"format_version": FORMAT_VERSION, "sha256": _sha256(_canonical(content)), **content}
        return json.dumps(document, indent=1, ensure_ascii=True) + "\n"

    @classmethod
    def load(cls, folder: Path | str) -> KernelLibrary:
        """Read a folder and check every byte of it. Raises KernelLibraryError, which names the file."""
        path = Path(folder) / INDEX
        document = _read_index(path)
        try:
            content = {"compiler": document["compiler"], "kernels": document["kernels"]}
            if document["sha256"] != _sha256(_canonical(content)):
                raise KernelLibraryError(f"{path}: damaged (its checksum is another's); copy the folder again")
            return cls(tuple(_from_json(entry, path.parent) for entry in content["kernels"]), content["compiler"])
        except (KeyError, TypeError, AttributeError) as error:
            raise KernelLibraryError(f"{path}: no description of kernels ({error!r}); copy the folder again") from error


def kernels_folder(model: Path | str) -> Path:
    """Where the kernels of an ONNX file are: MODEL.kernels/ beside MODEL.onnx."""
    return Path(model).with_suffix(".kernels")


def _read_index(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise KernelLibraryError(f"{path}: not there; copy the folder of kernels along with the ONNX file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise KernelLibraryError(f"{path}: cannot be read: {error}") from error
    if not isinstance(document, dict) or "format_version" not in document:
        raise KernelLibraryError(f"{path}: no description of kernels; copy the folder again")
    if document["format_version"] != FORMAT_VERSION:
        raise KernelLibraryError(
            f"{path}: format version {document['format_version']}, and this fp4export reads {FORMAT_VERSION}; "
            "use the version that exported it"
        )
    return document


def _to_json(kernel: LibraryKernel) -> dict[str, Any]:
    described = asdict(kernel) | {"sha256": kernel.sha256}
    del described["ptx"]
    return described


def _from_json(entry: Mapping[str, Any], folder: Path) -> LibraryKernel:
    name = entry["entry"]
    if not NAME.fullmatch(name):
        raise KernelLibraryError(f"{folder / INDEX}: {name!r} cannot name a kernel")
    major, minor = entry["capability"]
    unknown = sorted(set(entry["scalars"]) - set(get_args(Scalar)))
    if unknown:
        raise KernelLibraryError(f"{folder / INDEX}: {name} takes the unknown scalar {unknown[0]!r}")
    return LibraryKernel(
        op_type=entry["op_type"],
        tactic=entry["tactic"],
        capability=(major, minor),
        entry=name,
        inputs=_pointers(entry["inputs"]),
        scalars=tuple(entry["scalars"]),
        outputs=_pointers(entry["outputs"]),
        launch=Launch(**entry["launch"]),
        shared_bytes=entry["shared_bytes"],
        ptx_version=entry["ptx_version"],
        ptx=_read_ptx(folder / f"{name}.ptx", entry["sha256"]),
    )


def _pointers(entries: Iterable[Mapping[str, str]]) -> tuple[Pointer, ...]:
    return tuple(Pointer(**entry) for entry in entries)


def _read_ptx(path: Path, sha256: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise KernelLibraryError(f"{path}: cannot be read: {error.strerror or error}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise KernelLibraryError(f"{path}: damaged (its checksum is another's); copy the folder again")
    return content.decode()


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _dotted(capability: Capability) -> str:
    return "{}.{}".format(*capability)
