"""Prompt lists as the benchmarks publish them, and which of their prompts a setup draws."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from exporter.errors import InputError

Selection = Literal["first", "shuffled"]

_NAME = re.compile(r"[\w-][\w. -]*")
_LARGEST_FILE = 1 << 26


@dataclass(frozen=True)
class Prompt:
    """One image to draw: its file's name, its position in the list, and its text (None where only embeddings exist)."""

    name: str
    row: int
    text: str | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a list, in the file's order.

    .txt has one prompt a line; .json and .yaml are a list of texts (HPSv2's benchmark), map names to texts or to
    mappings with `prompt` (MJHQ-30K's meta_data.json, sDCI.yaml), or are COCO's caption annotations; .safetensors holds
    embeddings, without texts. Raises `InputError` for any other content.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a prompt list (.txt, .json, .yaml or .safetensors)")
    if path.suffix == ".safetensors":
        from exporter.generation.conditions import read_conditions

        return [Prompt(f"{row:05d}", row) for row in range(read_conditions(path).count)]
    if path.suffix not in (".txt", ".json", ".yaml", ".yml"):
        raise InputError(f"{path}: unknown suffix {path.suffix!r}; a prompt list is .txt, .json, .yaml or .safetensors")
    if path.stat().st_size > _LARGEST_FILE:
        raise InputError(f"{path}: over {_LARGEST_FILE >> 20} MiB, so it is no list of prompts")
    try:
        text = path.read_text(encoding="utf-8")
        pairs = _lines(text) if path.suffix == ".txt" else _entries(path, _parsed(path, text))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file") from error
    if not pairs:
        raise InputError(f"{path}: holds no prompts")
    for name, _ in pairs:
        if not _NAME.fullmatch(name) or ".." in name:
            raise InputError(f"{path}: {name!r} cannot name an image's file")
    return [Prompt(name, row, text) for row, (name, text) in enumerate(pairs)]


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        first = str(error).partition("\n")[0]
        raise InputError(f"{path}: not valid {path.suffix[1:].upper()}: {first}") from error


def _lines(text: str) -> list[tuple[str, str]]:
    lines = [line.strip() for line in text.splitlines()]
    return [(f"{row:05d}", line) for row, line in enumerate(line for line in lines if line)]


def _entries(path: Path, data: Any) -> list[tuple[str, str]]:
    if isinstance(data, dict) and isinstance(data.get("annotations"), list):
        captions = [entry.get("caption") if isinstance(entry, dict) else None for entry in data["annotations"]]
        named = [(f"{row:05d}", caption) for row, caption in enumerate(captions)]
    elif isinstance(data, list):
        named = [(f"{row:05d}", text) for row, text in enumerate(data)]
    elif isinstance(data, dict):
        texts = (value.get("prompt") if isinstance(value, dict) else value for value in data.values())
        named = list(zip(map(str, data), texts, strict=True))
    else:
        raise InputError(f"{path}: expected a list of prompts, names with prompts, or COCO's annotations")
    odd = next((name for name, text in named if not isinstance(text, str) or not text.strip()), None)
    if odd is not None:
        raise InputError(f"{path}: entry {odd!r} has no prompt text")
    return [(name, str(text)) for name, text in named]


def select(prompts: Sequence[Prompt], count: int | None, selection: Selection) -> list[Prompt]:
    """The `count` prompts that a setup draws (all if None), in the order in which they are drawn.

    `shuffled` is deepcompressor's: shuffled by Python's `random.Random(0)`, cut, and sorted by name.
    """
    if count is None:
        return list(prompts)
    if selection == "first":
        return list(prompts[:count])
    chosen = list(prompts)
    random.Random(0).shuffle(chosen)  # noqa: S311 - a published choice, no secret
    return sorted(chosen[:count], key=lambda prompt: prompt.name)
