"""diffusers' pipeline for a transformer, put together from a folder's parts; nothing in the folder is run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from torch import nn

from exporter.errors import InputError
from exporter.models.location import ModelFiles
from exporter.models.text_encoders import MODEL_INDEX, load_text_part, read_pipeline
from exporter.models.weight_files import only_variant, pickle_note
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
_TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
# diffusers' DiTPipeline hands the scheduler no generator, and does not scale the first noise.
_WRONG_IN_DIT = ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler")


@dataclass(frozen=True)
class PipelineFolder:
    """The folder around a transformer: its parts, as far as they are there."""

    root: Path
    scheduler: Path | None

    @classmethod
    def of(cls, files: ModelFiles) -> PipelineFolder:
        """The pipeline's folder, also when only its transformer's was given."""
        is_part = files.root == files.transformer and (files.root.parent / MODEL_INDEX).is_file()
        return cls(files.root.parent if is_part else files.root, files.scheduler)

    @property
    def has_vae(self) -> bool:
        """Whether there is an autoencoder to make images of latents."""
        return (self.root / "vae" / "config.json").is_file()

    def index(self) -> dict[str, Any]:
        """The content of model_index.json, {} without one. Raises `InputError`."""
        return read_pipeline(self.root) if (self.root / MODEL_INDEX).is_file() else {}


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
    name = _pipeline_name(folder, index, _class_of(transformer))
    if name == "DiTPipeline" and scheduler in _WRONG_IN_DIT:
        raise InputError(
            f"diffusers' {name} neither seeds the noise of {scheduler} nor scales it; take --scheduler DDIMScheduler "
            "or DPMSolverMultistepScheduler"
        )
    pipeline_class = getattr(diffusers, name)
    parts: dict[str, Any] = {
        "transformer": transformer,
        "scheduler": make_scheduler(scheduler, folder.scheduler, steps, noise),
    }
    if folder.has_vae:
        parts["vae"] = _load_autoencoder(folder.root / "vae")
    if text:
        parts.update({part: load_text_part(folder.root, index, part) for part in text_part_names(folder)})
    parameters = inspect.signature(pipeline_class.__init__).parameters
    absent = {key: None for key, value in parameters.items() if key != "self" and value.default is value.empty}
    if "requires_safety_checker" in parameters:
        parts["requires_safety_checker"] = False
    pipeline = pipeline_class(**{**absent, **parts})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def check_drawable(transformer: object, place: Path) -> None:
    """Raise `InputError`, naming `place`, for a transformer of a class that no known pipeline draws with."""
    if transformer not in PIPELINES:
        raise InputError(
            f"{place}: no pipeline is known for {transformer}; known: {', '.join(PIPELINES)}. Elsewhere "
            "exporter.runtime.EngineTransformer stands in for the transformer, in the model's own pipeline in Python"
        )


def _class_of(transformer: nn.Module) -> str:
    """The diffusers class that a transformer is, or that an engine stands for."""
    config: Mapping[str, Any] = getattr(transformer, "config", {})
    return str(config.get(CLASS_NAME, type(transformer).__name__))


def _pipeline_name(folder: PipelineFolder, index: Mapping[str, Any], transformer: str) -> str:
    check_drawable(transformer, folder.root)
    fitting = PIPELINES[transformer]
    name = index.get(CLASS_NAME, fitting[0])
    if name not in fitting:
        raise InputError(f"{folder.root / MODEL_INDEX}: is a {name}, but {transformer} works in {' or '.join(fitting)}")
    return str(name)


def text_part_names(folder: PipelineFolder) -> list[str]:
    """The text encoders and tokenizers that the pipeline has. Raises `InputError` when there is none."""
    index = folder.index()
    names = [name for name in _TEXT_PARTS if index.get(name) not in (None, [None, None])]
    if "text_encoder" not in names:
        raise InputError(
            f"{folder.root}: holds no text encoder, so texts cannot be drawn; give embeddings (safetensors), or a "
            "whole pipeline's folder with --pipeline"
        )
    return names


def _load_autoencoder(folder: Path) -> Any:
    """The autoencoder in its folder, never from a pickle or the network. Raises `InputError`."""
    loader: Any = diffusers.AutoencoderKL
    try:
        return loader.from_pretrained(folder, local_files_only=True, use_safetensors=True, variant=only_variant(folder))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(f"{folder}: cannot be loaded as an AutoencoderKL: {reason}{pickle_note(folder)}") from error
