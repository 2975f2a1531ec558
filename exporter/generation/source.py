"""Where an output's pipeline, prompts and sampler settings are: in the recipe beside it, unless said otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from exporter.errors import InputError
from exporter.generation.pipelines import PipelineFolder
from exporter.models.loading import ADAPTERS, load_transformer
from exporter.models.location import CONFIG, ModelFiles, find_model, locate_model, read_config
from exporter.recipe import Recipe, load_recipe
from exporter.transformer_config import CLASS_NAME

_RECIPE_ENDING = ".recipe.yaml"
_SCHEDULER, _STEPS, _GUIDANCE = "DPMSolverMultistepScheduler", 20, 4.5


@dataclass(frozen=True)
class DrawingDefaults:
    """What is used where the command says nothing: the recipe's settings, or PixArt's without a recipe."""

    prompts: Path | None = None
    scheduler: str = _SCHEDULER
    steps: int = _STEPS
    guidance: float = _GUIDANCE


@dataclass(frozen=True)
class DrawingSource:
    """The original model's files, the pipeline around it, and the defaults."""

    files: ModelFiles
    folder: PipelineFolder
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
            prompts = recipe.resolve_path(settings.prompts)
            defaults = DrawingDefaults(prompts, settings.scheduler, settings.steps, settings.guidance)
        return cls(files, PipelineFolder.of(files), defaults)

    def original(self) -> nn.Module:
        """The original transformer, from its weights. Raises `InputError` when they are not here."""
        name = read_config(self.files.transformer).get(CLASS_NAME)
        family = next((key for key, adapter in ADAPTERS.items() if adapter.class_name == name), None)
        if family is None:
            known = ", ".join(adapter.class_name for adapter in ADAPTERS.values())
            raise InputError(f"{self.files.transformer / CONFIG}: _class_name is {name!r}; supported: {known}")
        return load_transformer(self.files.transformer, family)


def recipe_path(output: Path) -> Path:
    """The resolved recipe that an export writes beside its output."""
    return output.with_name(output.stem + _RECIPE_ENDING)
