"""Where an output's pipeline, prompts and sampler settings are: in the recipe beside it, unless said otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exporter.errors import InputError
from exporter.generation.conditions import CLASS_LABELS, Embedded, read_conditions
from exporter.generation.pipelines import PipelineFolder, open_pipeline
from exporter.models.adapter import Adapter
from exporter.models.families import adapter_of
from exporter.models.loading import load_transformer
from exporter.models.location import CONFIG, ModelFiles, find_model, locate_model, read_config
from exporter.recipe import Recipe, load_recipe

_RECIPE_ENDING = ".recipe.yaml"
_SCHEDULER, _STEPS, _GUIDANCE = "DPMSolverMultistepScheduler", 20, 4.5


@dataclass(frozen=True)
class DrawingDefaults:
    """What is used where the command says nothing: the recipe's settings, or PixArt's without a recipe."""

    prompts: Path | None = None
    classes: tuple[int, ...] | None = None
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
    def of_output(cls, output: Path, pipeline: Path | None = None) -> DrawingSource:
        """The source of an exported file: of the recipe beside it, or in the folder `pipeline`.

        Raises `InputError` when there is neither.
        """
        file = recipe_path(output)
        recipe = load_recipe(file) if file.is_file() else None
        if recipe is None and pipeline is None:
            raise InputError(
                f"{output}: {file.name}, which would say where its pipeline is, is not beside it; give the pipeline's "
                "or the model's folder with --pipeline DIR"
            )
        return cls.of_recipe(recipe, pipeline)

    @classmethod
    def of_recipe(cls, recipe: Recipe | None, pipeline: Path | None = None) -> DrawingSource:
        """The source that a recipe names; the folder `pipeline` comes before the recipe's model."""
        if pipeline is not None:
            files = find_model(pipeline)
        elif recipe is not None:
            files = locate_model(recipe)
        else:
            raise InputError("nothing says where the model is; give its folder with --pipeline DIR")
        defaults = DrawingDefaults()
        if recipe is not None:
            settings = recipe.calibration
            prompts = None if settings.prompts is None else recipe.resolve_path(settings.prompts)
            defaults = DrawingDefaults(
                prompts, settings.classes, settings.scheduler, settings.steps, settings.guidance, recipe.model.variant
            )
        adapter = adapter_of(read_config(files.transformer), files.transformer / CONFIG)
        return cls(files, PipelineFolder.of(files), adapter, defaults)

    def original(self) -> nn.Module:
        """The original transformer, from its weights. Raises `InputError` when they are not here."""
        return load_transformer(self.files.transformer, self.adapter, self.defaults.variant)

    def pipeline(self, transformer: nn.Module, scheduler: str, steps: int, *, device: torch.device, text: bool) -> Any:
        """The pipeline with `transformer` in it, see `open_pipeline`."""
        noise = self.adapter.training_noise
        return open_pipeline(self.folder, transformer, scheduler, steps, noise, device=device, text=text)

    def conditions(self, prompts: Path | None) -> Embedded:
        """The embeddings or class labels in `prompts`, else what the recipe draws. Raises `InputError`."""
        file = prompts or self.defaults.prompts
        if file is not None:
            return read_conditions(file)
        if self.defaults.classes is not None:
            return Embedded(Path("calibration.classes"), {CLASS_LABELS: torch.tensor(self.defaults.classes)})
        raise InputError(f"nothing to draw: give --prompts FILE with embeddings or {CLASS_LABELS}, or --prompt TEXT")


def recipe_path(output: Path) -> Path:
    """The resolved recipe that an export writes beside its output."""
    return output.with_name(output.stem + _RECIPE_ENDING)
