"""Images of a prompt list: drawn once, kept, and the same whoever draws them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exporter.errors import InputError
from exporter.evaluation.prompts import Prompt
from exporter.files import write_text_atomically
from exporter.generation.conditions import Conditions, Texts
from exporter.generation.generate import Image, Settings, generate
from exporter.generation.pictures import kind_of, save_png
from exporter.generation.source import DrawingSource
from exporter.progress import Progress
from exporter.shards import Shard

SETTINGS = "settings.json"


@dataclass(frozen=True)
class DrawingPlan:
    """What is drawn and how; the same for both models. `seeds` go with `prompts`."""

    source: DrawingSource
    conditions: Conditions
    prompts: Sequence[Prompt]
    seeds: Sequence[int]
    scheduler: str
    settings: Settings
    batch: int
    device: torch.device

    def chunks(self) -> list[list[tuple[Prompt, Image]]]:
        """Runs of `batch` prompts.

        A run is always drawn as a whole, since rounding may differ with the batch: so neither the number of processes
        nor an interruption changes a byte.
        """
        pairs = [(prompt, Image(prompt.row, seed)) for prompt, seed in zip(self.prompts, self.seeds, strict=True)]
        return [pairs[start : start + self.batch] for start in range(0, len(pairs), self.batch)]


def draw_images(
    plan: DrawingPlan, folder: Path, load: Callable[[], nn.Module], shard: Shard, progress: Progress
) -> None:
    """Draw this process's share of the plan into `folder`, NAME.png each; what is there already is kept.

    `load` gives the transformer, and is called only if something is missing. The pipeline has to make images.
    """
    missing = [
        chunk
        for chunk in shard.mine(plan.chunks())
        if not all((folder / _file(prompt)).is_file() for prompt, _ in chunk)
    ]
    if not missing:
        return
    text = isinstance(plan.conditions, Texts)
    pipeline = plan.source.pipeline(load(), plan.scheduler, plan.settings.steps, device=plan.device, text=text)
    with progress.task(f"drawing {folder.name}", len(missing) * plan.settings.steps) as task:
        for chunk in missing:
            images = [image for _, image in chunk]
            drawn = generate(pipeline, plan.conditions, images, plan.settings, task.advance)
            kind = kind_of(drawn, decoded=plan.source.folder.has_vae)
            for (prompt, _), pixels in zip(chunk, kind.pixels(drawn), strict=True):
                save_png(pixels, folder / _file(prompt))


def _file(prompt: Prompt) -> str:
    return f"{prompt.name}.png"


def claim_folder(folder: Path, settings: dict[str, Any], models: Sequence[str]) -> None:
    """Note in `folder` what its images are drawn from, and make a folder in it for every model.

    Raises `InputError` if it holds images of something else, or of nobody knows what.
    """
    file = folder / SETTINGS
    drawn = any(next((folder / model).glob("*.png"), None) is not None for model in models)
    if drawn and not file.is_file():
        raise InputError(f"{folder}: holds images, but no {SETTINGS} that says what they are of; give another folder")
    if drawn:
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file}: damaged: {error}; remove {folder} or give another folder") from error
        changed = [key for key in settings if not isinstance(before, dict) or before.get(key) != settings[key]]
        if changed:
            raise InputError(
                f"{folder}: holds images drawn with another {', '.join(changed)}; remove it or give another folder"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps(settings, indent=1, sort_keys=True, allow_nan=False) + "\n")
    for model in models:
        (folder / model).mkdir(exist_ok=True)
