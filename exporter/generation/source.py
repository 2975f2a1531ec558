"""Where an output's pipeline, prompts and sampler settings are: in the recipe beside it, unless said otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exporter.errors import InputError
from exporter.generation.conditions import Conditions, Embedded, Texts, class_labels, read_conditions
from exporter.generation.pipelines import PipelineFolder, check_drawable, open_pipeline, text_part_names
from exporter.models.adapter import Adapter
from exporter.models.families import adapter_of
from exporter.models.inputs import HIDDEN_STATES
from exporter.models.loading import load_transformer, skeleton
from exporter.models.location import CONFIG, PART_FILES, TEXT_PARTS, ModelFiles, find_model, locate_model, read_config
from exporter.models.prompts import spread_labels
from exporter.models.text_encoders import MODEL_INDEX
from exporter.models.weight_files import only_variant, weight_files
from exporter.recipe import load_recipe
from exporter.runtime.open import check_output_file
from exporter.runtime.transformer import EngineTransformer
from exporter.transformer_config import CLASS_NAME

_RECIPE_ENDING = ".recipe.yaml"
_SCHEDULER, _STEPS, _GUIDANCE = "DPMSolverMultistepScheduler", 20, 4.5


@dataclass(frozen=True)
class DrawingDefaults:
    """What is used where the command says nothing: the recipe's settings, or PixArt's without a recipe.

    Without `classes` as many as `class_count`, spread over all, are drawn by a family that draws class labels.
    """

    prompts: Path | None = None
    classes: tuple[int, ...] | None = None
    class_count: int = 16
    scheduler: str = _SCHEDULER
    steps: int = _STEPS
    guidance: float = _GUIDANCE
    variant: str | None = None


@dataclass(frozen=True)
class DrawingSource:
    """The original model's files, the pipeline around it, and the defaults."""

    files: ModelFiles
    folder: PipelineFolder
    adapter: Adapter
    defaults: DrawingDefaults

    @classmethod
    def of_output(cls, output: Path, pipeline: Path | None = None, *, text: bool = False) -> DrawingSource:
        """The source of an exported file: of the recipe beside it, or in the folder `pipeline`.

        `text`: text encoders are needed, too. Raises `InputError` when there is neither, or for a transformer that no
        known pipeline draws with.
        """
        check_output_file(output)
        file = recipe_path(output)
        recipe = load_recipe(file) if file.is_file() else None
        if pipeline is not None:
            files = find_model(pipeline)
        elif recipe is not None:
            files = locate_model(recipe, ("vae", *(TEXT_PARTS if text else ())))
        else:
            raise InputError(
                f"{output}: {file.name}, which would say where its pipeline is, is not beside it; give the pipeline's "
                "or the model's folder with --pipeline DIR"
            )
        defaults = DrawingDefaults()
        if recipe is not None:
            settings = recipe.calibration
            prompts = None if settings.prompts is None else recipe.resolve_path(settings.prompts)
            defaults = DrawingDefaults(
                prompts=prompts,
                classes=settings.classes,
                class_count=settings.samples,
                scheduler=settings.scheduler,
                steps=settings.steps,
                guidance=settings.guidance,
                variant=recipe.model.variant if pipeline is None else None,
            )
        config = read_config(files.transformer)
        check_drawable(config.get(CLASS_NAME), files.transformer / CONFIG)
        adapter = adapter_of(config, files.transformer / CONFIG)
        return cls(files, PipelineFolder.of(files), adapter, defaults)

    def original(self) -> nn.Module:
        """The original transformer, from its weights. Raises `InputError` when they are not here."""
        return load_transformer(self.files.transformer, self.adapter, self._variant)

    def files_drawn_with(self, *, text: bool) -> list[Path]:
        """The pipeline's files that an image depends on; `text`: it is drawn from a caption, by text encoders.

        Raises `InputError` when the original's weights are not here.
        """
        transformer, root = self.files.transformer, self.folder.root
        parts = ("vae", *(TEXT_PARTS if text else ()))
        return [
            transformer / CONFIG,
            *weight_files(transformer, self._variant),
            *(file for file in (root / MODEL_INDEX, self.files.scheduler) if file is not None and file.is_file()),
            *sorted(file for part in parts for pattern in PART_FILES for file in root.glob(f"{part}/{pattern}")),
        ]

    @property
    def _variant(self) -> str | None:
        return self.defaults.variant or only_variant(self.files.transformer)

    def engine(self, output: Path, device: str | None) -> EngineTransformer:
        """The exported file in the transformer's place. Raises `InputError` if it stands for another model."""
        loaded = EngineTransformer.load(output, model=self.files.root, device=device)
        model = self._skeleton()
        names, has = set(self.adapter.input_names(model)), {spec.name for spec in loaded.engine.inputs}
        channels = {spec.shape[1] for spec in loaded.engine.inputs if spec.name == HIDDEN_STATES}
        if names != has or channels != {self.adapter.config(model).in_channels}:
            raise InputError(
                f"{output}: was not exported from {self.files.transformer}: its inputs are {', '.join(sorted(has))}, "
                f"the model's {', '.join(sorted(names))}; give its own model's folder with --pipeline DIR"
            )
        return loaded

    def _skeleton(self) -> nn.Module:
        folder = self.files.transformer
        return skeleton(read_config(folder), self.adapter, folder / CONFIG)

    def pipeline(self, transformer: nn.Module, scheduler: str, steps: int, *, device: torch.device, text: bool) -> Any:
        """The pipeline with `transformer` in it, see `open_pipeline`."""
        noise = self.adapter.training_noise
        return open_pipeline(self.folder, transformer, scheduler, steps, noise, device=device, text=text)

    def conditions(self, prompts: Path | None) -> Embedded:
        """The embeddings or class labels in `prompts`, else what the recipe draws. Raises `InputError`."""
        file = prompts or self.defaults.prompts
        classes = self._classes()
        if file is not None:
            found = read_conditions(file)
            wrong = [label for label in found.labels if not 0 <= label < classes]
            if classes and wrong:
                raise InputError(
                    f"{file}: class_labels: {wrong[0]} is none of the model's {classes} classes, 0 to {classes - 1}"
                )
            return found
        if not classes:
            raise InputError("nothing to draw: give --prompts FILE with embeddings, or --prompt TEXT")
        return class_labels(self.defaults.classes or spread_labels(classes, self.defaults.class_count))

    def texts(self, texts: Sequence[str], negative: str, tokens: int | None) -> Conditions:
        """Captions for the text encoders, with `tokens` each; numbers of classes in a family that draws these.

        Raises `InputError` for anything else there, or where the folder has no text encoder.
        """
        classes = self._classes()
        if not classes:
            text_part_names(self.folder)
            return Texts(tuple(texts), negative, tokens)
        for text in texts:
            if not text.isdecimal() or int(text) >= classes:
                raise InputError(f"{text!r}: family {self.adapter.family} draws class labels, from 0 to {classes - 1}")
        return class_labels([int(text) for text in texts])

    def _classes(self) -> int:
        """How many classes the model draws, 0 for one that draws prompts."""
        return max(condition.classes for condition in self.adapter.conditions(self._skeleton()))


def recipe_path(output: Path) -> Path:
    """The resolved recipe that an export writes beside its output."""
    return output.with_name(output.stem + _RECIPE_ENDING)
