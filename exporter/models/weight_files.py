"""Safetensors files: finding a checkpoint's, refusing what can run code, and saying what is wrong with the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from exporter.errors import InputError

_STEM = "diffusion_pytorch_model"
# One file, and the index of several, with a variant in their names.
_VARIANT_NAMES = (r"{stem}\.(\w+)\.safetensors", r"{stem}\.safetensors\.index\.(\w+)\.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PICKLE_ADVICE = (
    "a pickle can run any code when it is opened; convert it to safetensors where you trust it "
    "(diffusers: save_pretrained(DIR, safe_serialization=True))"
)
_LFS_POINTER = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"
_PICKLED = (_ZIP, *(bytes((0x80, protocol)) for protocol in range(2, 6)))
_LENGTH_BYTES = 8


def has_weights(transformer: Path) -> bool:
    """Whether there are safetensors files at all: a config alone is enough to plan."""
    return any(transformer.glob("*.safetensors"))


def weight_patterns(variant: str | None) -> tuple[str, ...]:
    """Patterns of the names that a checkpoint's files have, one or several, and their index."""
    part = f".{variant}" if variant else ""
    return f"{_STEM}{part}.safetensors", f"{_STEM}{part}-*.safetensors", f"{_STEM}.safetensors.index{part}.json"


def weight_files(transformer: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files that make up the checkpoint: one, or the shards of an index.

    `variant` is what diffusers puts into their names, as in ``diffusion_pytorch_model.fp16.safetensors``. Raises
    `InputError`.
    """
    part = f".{variant}" if variant else ""
    index = transformer / f"{_STEM}.safetensors.index{part}.json"
    if index.is_file():
        return _shards(index)
    single = transformer / f"{_STEM}{part}.safetensors"
    if single.is_file():
        return [single]
    files = sorted(transformer.glob("*.safetensors"))
    variants = sorted(_variants(transformer))
    if variant or variants:
        there = ", ".join(variants) or "none"
        fix = (
            "leave model.variant out" if not variants else f"set model.variant, as in --set model.variant={variants[0]}"
        )
        raise InputError(f"{transformer}: there is no {single.name}; variants here: {there}; {fix}")
    if len(files) == 1:
        return files
    if files:
        names = ", ".join(file.name for file in files)
        raise InputError(f"{transformer}: which of {names} are the weights? Name one {_STEM}.safetensors")
    what = pickle_note(transformer) or "; only the config is here"
    raise InputError(f"{transformer}: there is no {_STEM}.safetensors{what}")


def only_variant(part: Path, stem: str = _STEM) -> str | None:
    """The variant of a pipeline's part that is there in no other: None beside files without a variant, or several."""
    if any((part / f"{stem}{ending}").is_file() for ending in (".safetensors", ".safetensors.index.json")):
        return None
    variants = _variants(part, stem)
    return variants.pop() if len(variants) == 1 else None


def pickle_note(part: Path) -> str:
    """The end of a message about a folder that cannot be loaded: what to do with the pickle in it, if there is one."""
    pickles = sorted(file for file in part.iterdir() if file.suffix in _PICKLES)
    return f"; {pickles[0].name} is refused: {_PICKLE_ADVICE}" if pickles else ""


def _variants(folder: Path, stem: str = _STEM) -> set[str]:
    """The variants that the folder holds."""
    names = [file.name for file in folder.iterdir() if file.is_file()]
    patterns = [re.compile(pattern.format(stem=stem)) for pattern in _VARIANT_NAMES]
    return {found[1] for name in names for pattern in patterns if (found := pattern.fullmatch(name))}


def _shards(index: Path) -> list[Path]:
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{index}: cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{index}: not valid JSON: {error}") from error
    shards = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise InputError(f"{index}: has no weight_map from tensor names to files")
    files = [index.parent / name for name in dict.fromkeys(shards.values())]
    for file in files:
        if file.parent != index.parent:
            raise InputError(f"{index}: names {file.name} outside its own folder")
        if not file.is_file():
            raise InputError(f"{index}: names {file.name}, which is not there; download it again")
    return files


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in a safetensors file, one at a time. Raises `InputError`."""
    with _opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict: it has no iterator
            yield name, tensors.get_tensor(name)


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor in a safetensors file, whose values are not read. Raises `InputError`."""
    with _opened(file) as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - as above


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The file as safetensors opens it, which says nothing of its type."""
    _refuse_other_content(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise InputError(
            f"{file}: damaged or incomplete safetensors ({file.stat().st_size} bytes): {error}; download it again"
        ) from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error


def _refuse_other_content(file: Path) -> None:
    """Say what a file is that only calls itself safetensors."""
    try:
        with file.open("rb") as stream:
            head = stream.read(len(_LFS_POINTER))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    if head.startswith(_LFS_POINTER):
        raise InputError(f"{file}: is a Git LFS pointer, not the weights; run: git lfs pull")
    # A safetensors file starts with its header's length, whose high bytes are zero; a pickle does not.
    pickled = head.startswith(_PICKLED) and any(head[_LENGTH_BYTES // 2 : _LENGTH_BYTES])
    if file.suffix in _PICKLES or pickled:
        raise InputError(f"{file}: is a pickle (torch.save), refused: {_PICKLE_ADVICE}")
    if not head:
        raise InputError(f"{file}: is empty")
