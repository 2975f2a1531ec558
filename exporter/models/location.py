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
from exporter.model_section import ModelSection
from exporter.models.weight_files import has_weights, weight_patterns
from exporter.recipe import Recipe

CONFIG = "config.json"
TRANSFORMER = "transformer"

_HUB_ID = re.compile(r"(?!.*(--|\.\.))[\w-][\w.-]*/[\w-][\w.-]*")
_LARGEST_CONFIG = 1 << 20
TEXT_PARTS = ("text_encoder*", "tokenizer*")
"""A pipeline's folders that turn captions into embeddings, as patterns."""
PART_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")
"""What such folders, and an autoencoder's, hold that is read, as patterns."""
# A repository is a pipeline, or a transformer alone with its files at the root.
_TRANSFORMER_PLACES = (f"{TRANSFORMER}/", "")
_CONFIG_PATTERNS = (*(f"{place}{CONFIG}" for place in _TRANSFORMER_PLACES), "scheduler/*.json", "model_index.json")


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
        directory = _download(recipe.model, parts=parts)
    return find_model(directory)


def locate_config(recipe: Recipe) -> FoundConfig:
    """The transformer's config; of a Hub id only that file is fetched, and nothing stays on the disk."""
    directory = _local_directory(recipe)
    if directory is not None:
        transformer = find_model(directory).transformer
        missing = None if has_weights(transformer) else f"{transformer} holds no safetensors, only a config"
        return FoundConfig(transformer / CONFIG, read_config(transformer), missing)
    cached = _cached_config(recipe.model)
    if cached is not None:
        return _hub_config(recipe.model, cached)
    with tempfile.TemporaryDirectory() as cache:
        return _hub_config(recipe.model, _download(recipe.model, config_only=True, cache=cache))


def _hub_config(model: ModelSection, snapshot: Path) -> FoundConfig:
    transformer = find_model(snapshot).transformer
    missing = None if has_weights(transformer) else f"{model.weights} will be downloaded from the Hub"
    name = Path(model.weights, transformer.relative_to(snapshot), CONFIG)
    return FoundConfig(name, read_config(transformer), missing)


def locate_pipeline(given: str, start: Path, revision: str | None = None) -> Path:
    """The folder of a whole pipeline, text encoders included: a directory (relative to `start`) or a Hub id, of which
    the `revision` (None: the main branch) is taken.

    A transformer's own folder stands for the pipeline around it. Raises as `locate_model` does.
    """
    path = start / Path(given).expanduser()
    if not path.is_dir():
        if not _HUB_ID.fullmatch(given):
            raise InputError(f"{path}: no such directory")
        advice = "download it where there is a network and give its folder instead"
        patterns = (*_CONFIG_PATTERNS, *_part_patterns(TEXT_PARTS))
        return fetch_snapshot("pipeline", given, patterns, advice, revision=revision)
    return path.parent if path.resolve().name == TRANSFORMER else path


def _local_directory(recipe: Recipe) -> Path | None:
    """The directory that `model.weights` names, None if it has to be a Hub id."""
    given = recipe.model.weights
    path = recipe.resolve_path(given)
    if path.is_dir():
        if recipe.model.revision is not None:
            raise InputError(
                f"{recipe.name}: model.revision: {path} is a directory, and only a Hub id's repository has revisions; "
                "leave it out"
            )
        return path
    if path.is_file():
        raise InputError(f"{path}: is a file; model.weights is the directory that holds {CONFIG}")
    if _HUB_ID.fullmatch(given):
        return None
    raise InputError(f"{recipe.name}: model.weights: {path} does not exist")


def find_model(directory: Path) -> ModelFiles:
    """The transformer in `directory`: its folder transformer/, or itself. Raises `InputError`."""
    for folder in (directory / TRANSFORMER, directory):
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


def _cached_config(model: ModelSection) -> Path | None:
    """The folder that the Hub's cache already has of this model, None if it has none with a config."""
    from huggingface_hub import try_to_load_from_cache

    for place in _TRANSFORMER_PLACES:
        found = try_to_load_from_cache(model.weights, f"{place}{CONFIG}", revision=model.revision)
        if isinstance(found, str):
            return Path(found).parents[place.count("/")]
    return None


def _part_patterns(parts: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{part}/{name}" for part in parts for name in PART_FILES)


def _download(
    model: ModelSection, *, parts: Sequence[str] = (), config_only: bool = False, cache: str | None = None
) -> Path:
    names = () if config_only else weight_patterns(model.variant)
    weights = [f"{place}{name}" for place in _TRANSFORMER_PLACES for name in names]
    advice = "download it where there is a network and give the folder: --set model.weights=DIR"
    return fetch_snapshot(
        "model.weights",
        model.weights,
        (*_CONFIG_PATTERNS, *weights, *_part_patterns(parts)),
        advice,
        revision=model.revision,
        cache=cache,
    )


def fetch_snapshot(
    what: str,
    hub_id: str,
    patterns: Sequence[str],
    advice: str,
    *,
    revision: str | None = None,
    cache: str | None = None,
) -> Path:
    """The folder with the repository's files that fit `patterns`, fetched where the Hub's cache lacks them.

    `revision` is a branch, tag or commit, None the main branch. `what` begins, and `advice` ends, the message of an
    `InputError` (no Hub id, no such revision) or `EnvironmentLacksError` (no Hub).
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns), cache_dir=cache))
    except HFValidationError as error:
        raise InputError(f"{what}: {hub_id}: neither a directory nor a Hub id") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{what}: the Hub's repository {hub_id} has no revision {revision!r}") from error
    except HfHubHTTPError as error:
        status = "with an error" if error.response is None else error.response.status_code
        raise EnvironmentLacksError(
            f"{what}: no directory {hub_id}, and the Hugging Face Hub answers {status} for that id; {advice}"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise EnvironmentLacksError(
            f"{what}: no directory {hub_id}, and the Hugging Face Hub cannot be reached; {advice}"
        ) from error
