"""`fp4export sample`: draw with an exported transformer, alone or beside the original from the same seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from exporter.errors import InputError
from exporter.files import atomic_path, check_parent, refuse_file, write_text_atomically
from exporter.generation.conditions import Conditions, Texts
from exporter.generation.generate import Image, Settings, batches, fitting_batch, generate
from exporter.generation.pictures import Kind, Pixels, comparison, contact_sheet, kind_of, psnr, save_png
from exporter.generation.source import DrawingSource
from exporter.progress import Progress
from exporter.runtime.transformer import EngineTransformer

LATENTS = ".safetensors"
PICTURE = ".png"
_FACTS = "samples.json"
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

    A folder gets one PNG an image, as soon as its batch is drawn (or latents.safetensors), and samples.json; NAME.png
    all images in one picture; NAME.safetensors the tensors. Image i is drawn from prompt i (in turn) and seed
    `options.seed` + i. Raises `InputError`, and `EnvironmentLacksError` where a runtime, a device or a package is
    missing.
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
    batch = fitting_batch(options.batch, transformer.engine, settings)
    scheduler = options.scheduler or source.defaults.scheduler
    draw = _Drawing(source, scheduler, conditions, settings, images, batch, transformer.device)
    single = destination.suffix in (PICTURE, LATENTS)
    folder = None if single else _Folder(destination, decoded=source.folder.has_vae)
    ours = draw.with_transformer(transformer, output.name, progress, None if folder is None else folder.add)
    original = draw.with_transformer(source.original(), "original", progress) if options.compare else None
    kind = kind_of(ours if original is None else original, decoded=source.folder.has_vae)
    if not kind.is_image:
        progress.note(f"{source.folder.root} has no autoencoder (vae/): {kind.caption}")
    decibels = () if original is None else tuple(psnr(a, b, kind) for a, b in zip(original, ours, strict=True))
    writing = _Writing(output.name, kind, images, decibels)
    if folder is None:
        return SampleResult((writing.write(destination, ours, original),), kind.measure, decibels)
    facts = {"output": str(output), "scheduler": draw.scheduler, **asdict(settings), "batch": batch}
    written = [*folder.images, *writing.complete(folder.path, ours, original), folder.path / _FACTS]
    text = json.dumps({**facts, "images": _rows(images, decibels)}, indent=1, allow_nan=False)
    write_text_atomically(written[-1], f"{text}\n")
    return SampleResult(tuple(written), kind.measure, decibels)


def _check_destination(destination: Path) -> None:
    """Raise `InputError` for a place that cannot be written to, before anything is drawn."""
    if destination.suffix in (PICTURE, LATENTS):
        if destination.is_dir():
            raise InputError(f"{destination}: is a folder; give another NAME{destination.suffix}")
        check_parent(destination)
    elif destination.suffix:
        raise InputError(f"{destination}: expected a folder, NAME{PICTURE} or NAME{LATENTS}")
    else:
        refuse_file(destination, f"a folder, NAME{PICTURE} or NAME{LATENTS}")


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

    def with_transformer(
        self, transformer: nn.Module, name: str, progress: Progress, keep: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """All images, drawn by `transformer`; `keep` is given every batch of them, in order."""
        text = isinstance(self.conditions, Texts)
        pipeline = self.source.pipeline(transformer, self.scheduler, self.settings.steps, device=self.device, text=text)
        parts = batches(self.images, self.batch)
        with progress.task(f"drawing with {name}", len(parts) * self.settings.steps) as task:
            drawn = []
            for part in parts:
                drawn.append(generate(pipeline, self.conditions, part, self.settings, task.advance))
                if keep is not None:
                    keep(drawn[-1])
        return torch.cat(drawn)


@dataclass(frozen=True)
class _Folder:
    """A folder of `images`, written batch by batch; `decoded`: an autoencoder makes them."""

    path: Path
    decoded: bool
    images: list[Path] = field(default_factory=list)

    def add(self, drawn: Tensor) -> None:
        """Write a batch of images, in a folder that is made if need be; latents are no images."""
        self.path.mkdir(parents=True, exist_ok=True)
        # That of an earlier run says nothing of these images.
        (self.path / _FACTS).unlink(missing_ok=True)
        kind = kind_of(drawn, decoded=self.decoded)
        for pixels in kind.pixels(drawn) if kind.is_image else ():
            self.images.append(self.path / f"{len(self.images):05d}{PICTURE}")
            save_png(pixels, self.images[-1])


@dataclass(frozen=True)
class _Writing:
    """What is written of all images at once."""

    name: str
    kind: Kind
    images: Sequence[Image]
    decibels: Sequence[float]

    def write(self, file: Path, ours: Tensor, original: Tensor | None) -> Path:
        """Write the tensors or one picture, as the file's suffix says; returns its path."""
        if file.suffix == LATENTS:
            return self._tensors(file, ours, original)
        save_png(contact_sheet(self.kind.pixels(ours)) if original is None else self._compared(ours, original), file)
        return file

    def complete(self, folder: Path, ours: Tensor, original: Tensor | None) -> list[Path]:
        """Write what a folder gets beside its images; returns the paths."""
        written = [] if self.kind.is_image else [self._tensors(folder / f"latents{LATENTS}", ours, original)]
        if original is not None:
            written.append(folder / f"compare{PICTURE}")
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
