"""Whether this machine has room for what calibration keeps of activations, found out from the model's config alone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from exporter.calibration.activations import ActivationStore, choose_store
from exporter.calibration.placement import Placement, choose_placement
from exporter.describe import size_text
from exporter.errors import EnvironmentLacksError
from exporter.job import Job, default_work_dir
from exporter.models.families import recipe_adapter
from exporter.models.inputs import Condition
from exporter.models.loading import skeleton
from exporter.models.location import locate_config
from exporter.models.weight_files import tensor_shapes
from exporter.recipe import Recipe
from exporter.shards import Shard
from exporter.source import calibration_memory, caption_tokens, kept_activations, largest_block


@dataclass(frozen=True)
class ActivationRoom:
    """How many bytes of activations a recipe's calibration keeps, and what there is for them.

    `memory` bytes of main memory, the disk of the work folder `work`, or a GPU, where they fit `on_gpu`.
    """

    recipe: Recipe
    needed: int
    memory: int
    work: Path
    on_gpu: bool

    def store(self) -> ActivationStore | None:
        """Memory, or files in a folder; None: none are kept, or a GPU keeps them. Raises `EnvironmentLacksError` where
        nothing has room."""
        if not self.needed or self.on_gpu:
            return None
        samples = self.recipe.calibration.samples
        return choose_store(samples, self.needed // samples, self.memory, existing(self.work))

    def text(self) -> str:
        """How much there is to keep, and where it will be."""
        method = self.recipe.method
        if not self.needed:
            return f"none are kept (method.name: {method.name})"
        kept = f"{size_text(self.needed)} of {self.recipe.calibration.inputs} inputs while blocks are learned, kept"
        if self.on_gpu:
            return f"{kept} on the GPU"
        limit = f"calibration.memory is {size_text(self.memory)}"
        free = f"{size_text(shutil.disk_usage(existing(self.work)).free)} free"
        try:
            store = self.store()
        except EnvironmentLacksError:
            return f"{kept} nowhere: {limit}, and {self.work} has {free}"
        if store is None or store.folder is None:
            return f"{kept} in memory ({limit})"
        return f"{kept} in files in {self.work} ({free}; {limit})"


def activation_room(recipe: Recipe, work: Path, placement: Placement, processes: int = 1) -> ActivationRoom:
    """From the transformer's config and the sizes of the prompts' tensors. Raises `InputError` for a wrong one."""
    adapter = recipe_adapter(recipe.model)
    found = locate_config(recipe)
    model = skeleton(found.content, adapter, found.file)
    latent_shape = adapter.latent_shape(model, recipe.model.resolution)
    captions = _caption_tokens(recipe, adapter.conditions(model))
    needed = kept_activations(recipe, adapter, model, latent_shape, captions)
    on_gpu = placement.keeps(needed // processes, largest_block(adapter, model))
    return ActivationRoom(recipe, needed, calibration_memory(recipe), work, on_gpu)


def planned_room(recipe: Recipe, output: str | Path, work_dir: str | Path | None) -> ActivationRoom:
    """For a plan of what an export would do; on a CPU where the recipe's GPU is not here."""
    try:
        placement = choose_placement(recipe.calibration.device, recipe.calibration.device_memory, Shard())
    except EnvironmentLacksError:
        placement = Placement()
    return activation_room(recipe, default_work_dir(Path(output), work_dir), placement)


def print_room(room: ActivationRoom, console: Console) -> None:
    """Print how much activations take and where. Raises `EnvironmentLacksError` behind it where nothing has room."""
    console.print(f"activations {room.text()}", markup=False, highlight=False, soft_wrap=True)
    room.store()


def check_room(job: Job) -> None:
    """Before weights are fetched or read, raise `EnvironmentLacksError` where activations will have no room."""
    if job.recipe.method.name != "fp4dit":
        return
    settings = job.recipe.calibration
    placement = choose_placement(settings.device, settings.device_memory, job.shard)
    activation_room(job.recipe, job.work.path, placement, job.shard.world).store()


def existing(folder: Path) -> Path:
    """The folder, or the nearest one around it that is there already."""
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())


def _caption_tokens(recipe: Recipe, conditions: tuple[Condition, ...]) -> int:
    """Tokens of all captions that a prompt has; 0 where the file is not there yet, or lacks them."""
    given = recipe.calibration.prompts
    file = None if given is None else recipe.resolve_path(given)
    if file is None or not file.is_file():
        return 0
    shapes = tensor_shapes(file)
    return caption_tokens(shapes.get(condition.key, ()) for condition in conditions)
