"""Finding a recipe's file, reading it, and changing single values of it from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import InputError, did_you_mean
from exporter.explain import Location, format_location
from exporter.yaml_text import parse_yaml

# What pip calls the source tree's folder recipes/, beside the package `exporter`.
DATA_PACKAGE = "fp4export_recipes"

_LARGEST_RECIPE = 1 << 20


@dataclass(frozen=True)
class Override:
    """One value that a flag sets: where in the recipe, and the flag as the user wrote it, for messages."""

    location: Location
    value: object
    text: str


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the program: name (without suffix) → file."""
    root = Path(__file__).resolve().parents[1]
    folder = root / ("recipes" if (root / "pyproject.toml").is_file() else DATA_PACKAGE)
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_recipe(path: str | Path) -> Path:
    """The file at `path`, or the shipped recipe of that name (``digits``, ``recipes/digits.yaml``)."""
    given = Path(path).expanduser()
    if given.is_file():
        return given
    shipped = shipped_recipes()
    if str(given.parent) in (".", "recipes") and given.suffix in ("", ".yaml") and given.stem in shipped:
        return shipped[given.stem]
    if given.is_dir():
        raise InputError(f"{path}: is a folder, not a recipe; shipped recipes: {', '.join(shipped)}")
    raise InputError(f"{path}: no such recipe{did_you_mean(given.stem, shipped)}")


def read_mapping(file: Path) -> dict[str, Any]:
    """The content of a recipe's file. Raises `InputError` unless it is a YAML mapping."""
    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST_RECIPE + 1)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    if len(content) > _LARGEST_RECIPE:
        raise InputError(f"{file}: over {_LARGEST_RECIPE >> 20} MiB; a recipe is a short YAML text")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not a UTF-8 text file; a recipe is a short YAML text") from error
    data = parse_yaml(text, str(file))
    if data is None:
        raise InputError(f"{file}: is empty; a recipe is a YAML mapping with at least model and calibration")
    if not isinstance(data, dict):
        raise InputError(f"{file}: holds {_kind(data)}, but a recipe is a YAML mapping of keys to values")
    return data


def _kind(data: object) -> str:
    return "a list" if isinstance(data, list) else "a single value"


def parse_override(text: str) -> Override:
    """``layers.0.weight=e3m0`` as an `Override`; the value is YAML, so lists and mappings work too."""
    flag = f"--set {text}"
    key, separator, value = text.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise InputError(f"{flag}: expected key.path=value, for example --set calibration.steps=10")
    location = tuple(int(part) if part.isdecimal() else part for part in parts)
    return Override(location, parse_yaml(value, flag), flag)


def apply_overrides(data: dict[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """A copy of `data` with every override applied, missing sections added. Raises `InputError`."""
    changed = deepcopy(data)
    for override in overrides:
        _apply(changed, override)
    return changed


def _apply(data: dict[str, Any], override: Override) -> None:
    node: Any = data
    for depth, part in enumerate(override.location[:-1]):
        node = _enter(node, part, override, depth)
    last = override.location[-1]
    _check(node, last, override, len(override.location) - 1)
    node[last] = override.value


def _enter(node: Any, part: str | int, override: Override, depth: int) -> Any:
    """One step down, adding the section if the recipe leaves it to its defaults."""
    _check(node, part, override, depth)
    if isinstance(node, dict) and node.get(part) is None:
        node[part] = [] if isinstance(override.location[depth + 1], int) else {}
    return node[part]


def _check(node: Any, part: str | int, override: Override, depth: int) -> None:
    place = format_location(override.location[:depth]) or "the recipe"
    if isinstance(node, list):
        if not isinstance(part, int):
            raise InputError(f"{override.text}: {place} is a list; give an entry's number, not {part!r}")
        if part >= len(node):
            raise InputError(f"{override.text}: {place} has {len(node)} entries, numbered from 0")
    elif not isinstance(node, dict):
        raise InputError(f"{override.text}: {place} is a single value, it has no {part!r}")
    elif isinstance(part, int):
        raise InputError(f"{override.text}: {place} is no list, it has no entry {part}")
