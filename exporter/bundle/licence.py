"""The licence of a model's weights, as its own folder states it; "unknown" where it does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import InputError
from exporter.models.location import TRANSFORMER, ModelFiles
from exporter.yaml_text import parse_yaml

UNKNOWN = "unknown"

_CARD = "README.md"
_INDEX = "model_index.json"
_TEXTS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md")
_LARGEST = 1 << 20
_FENCE = "---\n"


@dataclass(frozen=True)
class Licence:
    """Its name, which file says so, and the file with its text; None where there is no such file."""

    name: str
    stated_in: str | None
    text: Path | None


def find_licence(files: ModelFiles) -> Licence:
    """Look at the model card, model_index.json and the licence's text in the pipeline's and the transformer's folder.

    A file that cannot be read states nothing: the export does not depend on it.
    """
    text = next((file for file in _candidates(files, _TEXTS) if file.is_file()), None)
    for file in _candidates(files, (_CARD, _INDEX)):
        name = _stated(file)
        if name is not None:
            return Licence(name, file.name, text)
    return Licence(UNKNOWN if text is None else f"see {text.name}", None if text is None else text.name, text)


def _candidates(files: ModelFiles, names: tuple[str, ...]) -> Iterator[Path]:
    pipeline = files.root.parent if files.root.name == TRANSFORMER else files.root
    for folder in dict.fromkeys((pipeline, files.root, files.transformer)):
        yield from (folder / name for name in names)


def _stated(file: Path) -> str | None:
    """What a model card's front matter, or a JSON file, says under `license`; a custom one by its `license_name`."""
    try:
        if not file.is_file() or file.stat().st_size > _LARGEST:
            return None
        text = file.read_text(encoding="utf-8")
        facts = json.loads(text) if file.suffix == ".json" else _front_matter(text, file)
    except (OSError, ValueError, RecursionError, InputError):
        return None
    if not isinstance(facts, dict):
        return None
    found = [facts.get(key) for key in ("license_name", "license")]
    return next((one for one in found if isinstance(one, str) and one), None)


def _front_matter(text: str, file: Path) -> object:
    if not text.startswith(_FENCE) or _FENCE not in text[len(_FENCE) :]:
        return None
    return parse_yaml(text[len(_FENCE) :].partition(_FENCE)[0], str(file))
