"""What an export starts from: the original model, its prompts, and the plan of what becomes of its layers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from exporter.errors import EnvironmentLacksError, InputError
from exporter.files import sha256_of
from exporter.job import Job
from exporter.models.config import PixArtConfig
from exporter.models.loading import get_adapter, load_transformer, model_shapes
from exporter.models.location import CONFIG, ModelFiles, locate_model
from exporter.models.pixart import PixArtAdapter, TransformerInputs
from exporter.models.prompts import Prompts, load_prompts
from exporter.models.weight_files import weight_files
from exporter.plan import Plan, plan_layers
from exporter.quality import class_accuracy
from exporter.recipe import CalibrationSection

# Inputs, targets, outputs by rounding to nearest and as learned, and the next block's inputs.
_BLOCK_COPIES = 5


@dataclass(frozen=True)
class Source:
    """The loaded original. `identity` names the exact bytes of everything that was read."""

    model: nn.Module
    adapter: PixArtAdapter
    prompts: Prompts
    plan: Plan
    files: ModelFiles
    latent_shape: tuple[int, int, int]
    identity: dict[str, str]

    @property
    def denoiser(self) -> Callable[[TransformerInputs], Tensor]:
        """The original's noise prediction."""
        return partial(self.adapter.predict_noise, self.model)

    def layer_facts(self) -> list[dict[str, object]]:
        """What codes and scales depend on, per layer: everything but the containers' names."""
        names = ("container", "asked_container")
        return [
            {**{key: value for key, value in asdict(layer).items() if key not in names}, "m": layer.multipliers}
            for layer in self.plan.layers
        ]


def load_source(job: Job) -> Source:
    """Load and check all that the recipe names, before anything takes long. Raises `InputError`."""
    recipe = job.recipe
    files = locate_model(recipe)
    adapter = get_adapter(recipe.model.family)
    model = load_transformer(files.transformer, recipe.model.family)
    prompts_file = recipe.resolve_path(recipe.calibration.prompts)
    prompts = load_prompts(prompts_file, adapter.caption_dim(model))
    plan = plan_layers(recipe, model_shapes(model), adapter.high_precision, job.target)
    latent_shape = adapter.latent_shape(model, recipe.model.resolution)
    _check_classifier(job, prompts, latent_shape)
    if recipe.method.name == "fp4dit":
        check_memory(recipe.calibration, adapter.config(model), latent_shape, installed_memory())
    read = {file.name: file for file in (files.transformer / CONFIG, *weight_files(files.transformer))}
    read["prompts"] = prompts_file
    if files.scheduler is not None:
        read["scheduler"] = files.scheduler
    return Source(
        model=model,
        adapter=adapter,
        prompts=prompts,
        plan=plan,
        files=files,
        latent_shape=latent_shape,
        identity={name: sha256_of(file) for name, file in read.items()},
    )


def check_memory(
    settings: CalibrationSection, config: PixArtConfig, latent_shape: tuple[int, int, int], available: int
) -> None:
    """Raise `EnvironmentLacksError` if block reconstruction would hold more than `available` bytes.

    A block's inputs, targets and outputs are kept for every captured input: [calls, tokens, width] in float32.
    """
    _, height, width = latent_shape
    tokens = height * width // config.patch_size**2
    calls = settings.steps * (1 if settings.guidance == 1.0 else 2)
    per_trajectory = _BLOCK_COPIES * calls * tokens * config.inner_dim * 4
    if settings.samples * per_trajectory > available:
        raise EnvironmentLacksError(
            f"calibration.samples: {settings.samples} trajectories need about "
            f"{settings.samples * per_trajectory / 1e9:.0f} GB of memory, this machine has {available / 1e9:.0f} GB: "
            f"at most {available // per_trajectory} fit (method.name=rtn needs none of it)"
        )


def installed_memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_classifier(job: Job, prompts: Prompts, latent_shape: tuple[int, int, int]) -> None:
    """Let the classifier judge blank samples, so that one that cannot judge is found before hours of work."""
    given = job.recipe.evaluation.classifier
    if given is None:
        return
    path = job.recipe.resolve_path(given)
    if not path.is_file():
        raise InputError(f"{job.recipe.name}: evaluation.classifier: {path} does not exist")
    if prompts.labels is None:
        raise InputError(
            f"{job.recipe.name}: evaluation.classifier needs a tensor 'labels' in {job.recipe.calibration.prompts}"
        )
    class_accuracy(torch.zeros(prompts.count, *latent_shape), prompts.labels, path)
