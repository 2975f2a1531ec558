"""`fp4export sample`: draw with an exported transformer, alone or beside the original from the same seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from exporter.errors import InputError
from exporter.files import atomic_path, check_parent, write_text_atomically
from exporter.generation.conditions import Conditions, Texts
from exporter.generation.generate import Image, Settings, batches, generate, largest_batch
from exporter.generation.pictures import Kind, Pixels, comparison, contact_sheet, kind_of, psnr, save_png
from exporter.generation.source import DrawingSource
from exporter.progress import Progress
from exporter.runtime.transformer import EngineTransformer

LATENTS = ".safetensors"
PICTURE = ".png"
_MOST_BY_DEFAULT = 16


@dataclass(frozen=True)
class SampleOptions:
    """What the command was told; None means the recipe's."""

    prompts: Path | None = None
    texts: tuple[str, ...] = ()
    negative: str = ""
    count: int | None = None
    scheduler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    batch: int = 4
    compare: bool = False
    pipeline: Path | None = None
    device: str | None = None


@dataclass(frozen=True)
class SampleResult:
    """The files that were written, and with a comparison the PSNR (of latents: SNR, see `measure`) of pairs in dB."""

    files: tuple[Path, ...]
    measure: str
    decibels: tuple[float, ...] = ()


def sample_output(output: Path, destination: Path, options: SampleOptions, progress: Progress) -> SampleResult:
    """Draw with the exported file `output` and write to `destination`.

    A folder gets one PNG an image (or latents.safetensors) and samples.json, NAME.png all images in one picture,
    NAME.safetensors the tensors. Image i is drawn from prompt i (in turn) and seed `options.seed` + i. Raises
    `InputError`, and `EnvironmentLacksError` where a runtime, a device or a package is missing.
    """
    if options.texts and options.prompts is not None:
        raise InputError("--prompt and --prompts: give texts or a file of embeddings, not both")
    if options.negative and not options.texts:
        raise InputError("--negative-prompt goes with --prompt; a file of embeddings holds its own")
    _check_destination(destination)
    source = DrawingSource.of_output(output, options.pipeline, text=bool(options.texts))
    transformer = source.engine(output, options.device)
    conditions = _conditions(source, options, transformer)
    settings = Settings(
        options.steps or source.defaults.steps,
        source.defaults.guidance if options.guidance is None else options.guidance,
        transformer.latent_size,
    )
    count = options.count or min(conditions.count, _MOST_BY_DEFAULT)
    images = [Image(index % conditions.count, options.seed + index) for index in range(count)]
    batch = largest_batch(options.batch, transformer.engine.largest_batch, settings)
    scheduler = options.scheduler or source.defaults.scheduler
    draw = _Drawing(source, scheduler, conditions, settings, images, batch, transformer.device)
    ours = draw.with_transformer(transformer, output.name, progress)
    original = draw.with_transformer(source.original(), "original", progress) if options.compare else None
    kind = kind_of(ours if original is None else original, decoded=source.folder.has_vae)
    if not kind.is_image:
        progress.note(f"{source.folder.root} has no autoencoder (vae/): {kind.caption}")
    decibels = () if original is None else tuple(psnr(a, b, kind) for a, b in zip(original, ours, strict=True))
    written = _Writing(destination, output.name, kind, images, decibels).write(ours, original)
    facts = {"output": str(output), "scheduler": draw.scheduler, **asdict(settings), "batch": batch}
    if destination.suffix not in (PICTURE, LATENTS):
        file = destination / "samples.json"
        text = json.dumps({**facts, "images": _rows(images, decibels)}, indent=1, allow_nan=False)
        write_text_atomically(file, f"{text}\n")
        written.append(file)
    return SampleResult(tuple(written), kind.measure, decibels)


def _check_destination(destination: Path) -> None:
    """Raise `InputError` for a place that cannot be written to, before anything is drawn."""
    if destination.suffix in (PICTURE, LATENTS):
        check_parent(destination)
    elif destination.suffix:
        raise InputError(f"{destination}: expected a folder, NAME{PICTURE} or NAME{LATENTS}")
    else:
        for place in (destination, *destination.parents):
            if place.exists() and not place.is_dir():
                raise InputError(f"{place}: is a file; give a folder, NAME{PICTURE} or NAME{LATENTS}")


def _conditions(source: DrawingSource, options: SampleOptions, transformer: EngineTransformer) -> Conditions:
    if options.texts:
        return source.texts(options.texts, options.negative, transformer.text_tokens)
    return source.conditions(options.prompts)


@dataclass(frozen=True)
class _Drawing:
    """One run of the sampler, the same for every transformer."""

    source: DrawingSource
    scheduler: str
    conditions: Conditions
    settings: Settings
    images: Sequence[Image]
    batch: int
    device: torch.device

    def with_transformer(self, transformer: nn.Module, name: str, progress: Progress) -> Tensor:
        """All images, drawn by `transformer`."""
        text = isinstance(self.conditions, Texts)
        pipeline = self.source.pipeline(transformer, self.scheduler, self.settings.steps, device=self.device, text=text)
        parts = batches(self.images, self.batch)
        with progress.task(f"drawing with {name}", len(parts) * self.settings.steps) as task:
            drawn = [generate(pipeline, self.conditions, part, self.settings, task.advance) for part in parts]
        return torch.cat(drawn)


@dataclass(frozen=True)
class _Writing:
    """Where generated images go."""

    destination: Path
    name: str
    kind: Kind
    images: Sequence[Image]
    decibels: Sequence[float]

    def write(self, ours: Tensor, original: Tensor | None) -> list[Path]:
        """Write all files; returns their paths."""
        if self.destination.suffix == LATENTS:
            return [self._tensors(self.destination, ours, original)]
        if self.destination.suffix == PICTURE:
            sheet = contact_sheet(self.kind.pixels(ours)) if original is None else self._compared(ours, original)
            save_png(sheet, self.destination)
            return [self.destination]
        self.destination.mkdir(parents=True, exist_ok=True)
        written = []
        if self.kind.is_image:
            for index, pixels in enumerate(self.kind.pixels(ours)):
                written.append(self.destination / f"{index:05d}{PICTURE}")
                save_png(pixels, written[-1])
        else:
            written.append(self._tensors(self.destination / f"latents{LATENTS}", ours, original))
        if original is not None:
            written.append(self.destination / f"compare{PICTURE}")
            save_png(self._compared(ours, original), written[-1])
        return written

    def _compared(self, ours: Tensor, original: Tensor) -> Pixels:
        labels = [
            f"prompt {image.row}, seed {image.seed}: {self.kind.measure} {decibel:.1f} dB"
            for image, decibel in zip(self.images, self.decibels, strict=True)
        ]
        names = ("original", self.name)
        return comparison(self.kind.pixels(original), self.kind.pixels(ours), names, labels, self.kind.caption)

    def _tensors(self, path: Path, ours: Tensor, original: Tensor | None) -> Path:
        tensors = {"samples": ours.contiguous()}
        if original is not None:
            tensors["original"] = original.contiguous()
        with atomic_path(path) as temporary:
            save_file(tensors, temporary)
        return path


def _rows(images: Sequence[Image], decibels: Sequence[float]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"prompt": image.row, "seed": image.seed} for image in images]
    for row, decibel in zip(rows, decibels, strict=False):
        # JSON has no infinity: equal images have none.
        row["db"] = round(decibel, 3) if math.isfinite(decibel) else None
    return rows
