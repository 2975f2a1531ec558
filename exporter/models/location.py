"""Where a recipe's model is: a directory in diffusers' layout, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import EnvironmentLacksError, InputError
from exporter.models.weight_files import has_weights, weight_patterns
from exporter.recipe import Recipe

CONFIG = "config.json"
TRANSFORMER = "transformer"

_HUB_ID = re.compile(r"(?!.*(--|\.\.))[\w-][\w.-]*/[\w-][\w.-]*")
_LARGEST_CONFIG = 1 << 20
TEXT_PARTS = ("text_encoder*", "tokenizer*")
"""A pipeline's folders that turn captions into embeddings, as patterns."""
_PART_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")
_CONFIG_PATTERNS = (f"{TRANSFORMER}/{CONFIG}", "scheduler/*.json", "model_index.json")


@dataclass(frozen=True)
class ModelFiles:
    """`root` is the directory as given (a pipeline's or a transformer's); `transformer` holds config.json."""

    root: Path
    transformer: Path

    @property
    def scheduler(self) -> Path | None:
        """The pipeline's scheduler config, also when only its transformer's folder was given; None without one."""
        pipeline = self.root.parent if self.root.name == TRANSFORMER else self.root
        file = pipeline / "scheduler" / "scheduler_config.json"
        return file if file.is_file() else None


@dataclass(frozen=True)
class FoundConfig:
    """A config.json, not yet checked: its name for messages, its content, and why its weights are not here."""

    file: Path
    content: dict[str, Any]
    weights_missing: str | None


def locate_model(recipe: Recipe, parts: Sequence[str] = ()) -> ModelFiles:
    """The model's files; a Hub id is downloaded (or found in the Hub's cache) when no such directory exists.

    Of a Hub id only the transformer is fetched, and the folders of its pipeline that `parts` name. Raises `InputError`,
    or `EnvironmentLacksError` when the Hub cannot give the model.
    """
    directory = _local_directory(recipe)
    if directory is None:
        directory = _download(recipe.model.weights, recipe.model.variant, parts=parts)
    return find_model(directory)


def locate_config(recipe: Recipe) -> FoundConfig:
    """The transformer's config; of a Hub id only that file is fetched, and nothing stays on the disk."""
    directory = _local_directory(recipe)
    if directory is not None:
        transformer = find_model(directory).transformer
        missing = None if has_weights(transformer) else f"{transformer} holds no safetensors, only a config"
        return FoundConfig(transformer / CONFIG, read_config(transformer), missing)
    hub_id = recipe.model.weights
    name = Path(hub_id, TRANSFORMER, CONFIG)
    cached = _cached_config(hub_id)
    if cached is not None:
        transformer = find_model(cached).transformer
        missing = None if has_weights(transformer) else f"{hub_id} will be downloaded from the Hub"
        return FoundConfig(name, read_config(transformer), missing)
    with tempfile.TemporaryDirectory() as cache:
        transformer = find_model(_download(hub_id, config_only=True, cache=cache)).transformer
        return FoundConfig(name, read_config(transformer), f"{hub_id} will be downloaded from the Hub")


def locate_pipeline(given: str, start: Path) -> Path:
    """The folder of a whole pipeline, text encoders included: a directory (relative to `start`) or a Hub id.

    A transformer's own folder stands for the pipeline around it. Raises as `locate_model` does.
    """
    path = start / Path(given).expanduser()
    if not path.is_dir():
        if not _HUB_ID.fullmatch(given):
            raise InputError(f"{path}: no such directory")
        advice = "download it where there is a network and give its folder instead"
        return fetch_snapshot("pipeline", given, (*_CONFIG_PATTERNS, *_part_patterns(TEXT_PARTS)), advice)
    return path.parent if path.resolve().name == TRANSFORMER else path


def _local_directory(recipe: Recipe) -> Path | None:
    """The directory that `model.weights` names, None if it has to be a Hub id."""
    given = recipe.model.weights
    path = recipe.resolve_path(given)
    if path.is_dir():
        return path
    if path.is_file():
        raise InputError(f"{path}: is a file; model.weights is the directory that holds {CONFIG}")
    if _HUB_ID.fullmatch(given):
        return None
    raise InputError(f"{recipe.name}: model.weights: {path} does not exist")


def find_model(directory: Path) -> ModelFiles:
    """The transformer in `directory`: itself, or its folder transformer/. Raises `InputError`."""
    for folder in (directory, directory / TRANSFORMER):
        if (folder / CONFIG).is_file():
            return ModelFiles(root=directory, transformer=folder)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory")
    raise InputError(
        f"{directory}: holds neither {CONFIG} nor {TRANSFORMER}/{CONFIG}; expected a model as diffusers' "
        "save_pretrained writes it"
    )


def read_config(transformer: Path) -> dict[str, Any]:
    """The content of the transformer's config.json, not yet checked. Raises `InputError`."""
    file = transformer / CONFIG
    try:
        if file.stat().st_size > _LARGEST_CONFIG:
            raise InputError(f"{file}: over {_LARGEST_CONFIG >> 20} MiB, so it is no model's config")
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{file}: not a JSON text file") from error
    if not isinstance(data, dict):
        raise InputError(f"{file}: expected a JSON object")
    return data


def _cached_config(hub_id: str) -> Path | None:
    """The folder that the Hub's cache already has of this model, None if it has none with a config."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, f"{TRANSFORMER}/{CONFIG}")
    return Path(found).parents[1] if isinstance(found, str) else None


def _part_patterns(parts: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{part}/{name}" for part in parts for name in _PART_FILES)


def _download(
    hub_id: str,
    variant: str | None = None,
    *,
    parts: Sequence[str] = (),
    config_only: bool = False,
    cache: str | None = None,
) -> Path:
    weights = () if config_only else weight_patterns(variant)
    patterns = (*_CONFIG_PATTERNS, *(f"{TRANSFORMER}/{name}" for name in weights), *_part_patterns(parts))
    advice = "download it where there is a network and give the folder: --set model.weights=DIR"
    return fetch_snapshot("model.weights", hub_id, patterns, advice, cache)


def fetch_snapshot(what: str, hub_id: str, patterns: Sequence[str], advice: str, cache: str | None = None) -> Path:
    """The folder with the repository's files that fit `patterns`, fetched where the Hub's cache lacks them.

    `what` begins, and `advice` ends, the message of an `InputError` (no Hub id) or `EnvironmentLacksError` (no Hub).
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns), cache_dir=cache))
    except HFValidationError as error:
        raise InputError(f"{what}: {hub_id}: neither a directory nor a Hub id") from error
    except HfHubHTTPError as error:
        status = "with an error" if error.response is None else error.response.status_code
        raise EnvironmentLacksError(
            f"{what}: no directory {hub_id}, and the Hugging Face Hub answers {status} for that id; {advice}"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise EnvironmentLacksError(
            f"{what}: no directory {hub_id}, and the Hugging Face Hub cannot be reached; {advice}"
        ) from error
