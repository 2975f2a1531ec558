"""diffusers' pipeline for a transformer, put together from a folder's parts; nothing in the folder is run."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from torch import nn

from exporter.errors import EnvironmentLacksError, InputError
from exporter.models.location import ModelFiles
from exporter.sampling import make_scheduler
from exporter.transformer_config import CLASS_NAME

PIPELINES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "PixArtTransformer2DModel": ("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        "HunyuanDiT2DModel": ("HunyuanDiTPipeline",),
        "DiTTransformer2DModel": ("DiTPipeline",),
    }
)
"""Transformer class → the pipelines that it works in; the first where the folder names none."""

_CPU = torch.device("cpu")
_INDEX = "model_index.json"
_TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
_TEXT_CLASSES = (
    "BertModel",
    "BertTokenizer",
    "BertTokenizerFast",
    "MT5EncoderModel",
    "T5EncoderModel",
    "T5Tokenizer",
    "T5TokenizerFast",
)


@dataclass(frozen=True)
class PipelineFolder:
    """The folder around a transformer: its parts, as far as they are there."""

    root: Path
    scheduler: Path | None

    @classmethod
    def of(cls, files: ModelFiles) -> PipelineFolder:
        """The pipeline's folder, also when only its transformer's was given."""
        is_part = files.root == files.transformer and (files.root.parent / _INDEX).is_file()
        return cls(files.root.parent if is_part else files.root, files.scheduler)

    @property
    def has_vae(self) -> bool:
        """Whether there is an autoencoder to make images of latents."""
        return (self.root / "vae" / "config.json").is_file()

    def index(self) -> dict[str, Any]:
        """The content of model_index.json, {} without one. Raises `InputError`."""
        file = self.root / _INDEX
        if not file.is_file():
            return {}
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: cannot be read as JSON: {error}") from error
        if not isinstance(data, dict):
            raise InputError(f"{file}: expected a JSON object")
        return data


def open_pipeline(
    folder: PipelineFolder,
    transformer: nn.Module,
    scheduler: str,
    steps: int,
    noise: Mapping[str, Any] | None,
    *,
    device: torch.device = _CPU,
    text: bool = False,
) -> Any:
    """The diffusers pipeline with `transformer` in it and diffusers' scheduler `scheduler`, which has `steps`.

    `noise` is the schedule where the folder has none (a family's `training_noise`).
    All its parts are moved to `device`, where an engine already is. The autoencoder is loaded where the folder has one,
    the text encoders only with `text`. Only the classes that these pipelines are made of are loaded, from safetensors.
    Raises `InputError` for a folder that does not fit the transformer or lacks a part that is asked for.
    """
    index = folder.index()
    pipeline_class = getattr(diffusers, _pipeline_name(folder, index, _class_of(transformer)))
    parts: dict[str, Any] = {
        "transformer": transformer,
        "scheduler": make_scheduler(scheduler, folder.scheduler, steps, noise),
    }
    if folder.has_vae:
        parts["vae"] = _load(folder.root / "vae", diffusers, "AutoencoderKL")
    if text:
        parts.update(_text_parts(folder, index))
    parameters = inspect.signature(pipeline_class.__init__).parameters
    absent = {name: None for name, value in parameters.items() if name != "self" and value.default is value.empty}
    if "requires_safety_checker" in parameters:
        parts["requires_safety_checker"] = False
    pipeline = pipeline_class(**{**absent, **parts})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _class_of(transformer: nn.Module) -> str:
    """The diffusers class that a transformer is, or that an engine stands for."""
    config: Mapping[str, Any] = getattr(transformer, "config", {})
    name = config.get(CLASS_NAME, type(transformer).__name__)
    if name not in PIPELINES:
        raise InputError(f"no pipeline is known for {name}; known: {', '.join(PIPELINES)}")
    return str(name)


def _pipeline_name(folder: PipelineFolder, index: Mapping[str, Any], transformer: str) -> str:
    fitting = PIPELINES[transformer]
    name = index.get(CLASS_NAME, fitting[0])
    if name not in fitting:
        raise InputError(f"{folder.root / _INDEX}: is a {name}, but {transformer} works in {' or '.join(fitting)}")
    return str(name)


def _text_parts(folder: PipelineFolder, index: Mapping[str, Any]) -> dict[str, Any]:
    """The text encoders and tokenizers that the index names. Raises `InputError` when there is none."""
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentLacksError(f"text encoders: {error}; pip install 'fp4export[embed]'") from error
    entries = {name: index[name] for name in _TEXT_PARTS if index.get(name) not in (None, [None, None])}
    parts = {}
    for name, entry in entries.items():
        library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if library != "transformers" or class_name not in _TEXT_CLASSES:
            raise InputError(f"{folder.root / _INDEX}: {name} is {entry}; known: {', '.join(_TEXT_CLASSES)}")
        parts[name] = _load(folder.root / name, transformers, class_name)
    if "text_encoder" not in parts:
        raise InputError(
            f"{folder.root}: holds no text encoder, so texts cannot be drawn; give embeddings (safetensors), or a "
            "whole pipeline's folder with --pipeline"
        )
    return parts


def _load(folder: Path, library: Any, class_name: str) -> Any:
    """A part of the pipeline from its own folder, never from a pickle or the network. Raises `InputError`."""
    loader = getattr(library, class_name)
    safely = {} if "Tokenizer" in class_name else {"use_safetensors": True}
    try:
        return loader.from_pretrained(folder, local_files_only=True, **safely)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: cannot be loaded as {class_name}: {str(error).partition(chr(10))[0]}") from error
    except ImportError as error:
        raise EnvironmentLacksError(f"{folder}: {error}; pip install 'fp4export[embed]'") from error
