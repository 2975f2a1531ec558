"""`fp4export evaluate`: images of both models for a prompt list, in one process or many, then the metrics."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.errors import InputError
from exporter.evaluation.images import DrawingPlan, claim_folder, draw_images
from exporter.evaluation.metrics import CLIP_MODEL, Metric, Pictures, Tools, measure, metrics_named
from exporter.evaluation.presets import Preset, get_preset
from exporter.evaluation.prompts import Prompt, read_prompts, select
from exporter.evaluation.results import Results
from exporter.files import refuse_file, sha256_of
from exporter.generation.conditions import Conditions, Texts
from exporter.generation.generate import Settings, fitting_batch
from exporter.generation.pictures import PIXEL_CHANNELS
from exporter.generation.pipelines import PipelineFolder
from exporter.generation.source import DrawingSource
from exporter.onnx_files import checksum_of
from exporter.progress import NullProgress, Progress
from exporter.recipe import load_recipe
from exporter.runtime.open import default_device
from exporter.runtime.transformer import EngineTransformer
from exporter.shards import Shard

ORIGINAL, QUANTIZED = "original", "quantized"
_RECIPE_SUFFIXES = ("", ".yaml", ".yml")


@dataclass(frozen=True)
class EvaluateOptions:
    """What the command was told; None means the preset's, or else the recipe's."""

    prompts: Path
    preset: str | None = None
    embeddings: Path | None = None
    count: int | None = None
    scheduler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    batch: int = 1
    metrics: tuple[str, ...] | None = None
    references: Path | None = None
    pipeline: Path | None = None
    device: str | None = None
    clip_model: str = CLIP_MODEL
    pythons: Mapping[str, str] = field(default_factory=dict)


def evaluate_output(
    subject: str, folder: Path, options: EvaluateOptions, progress: Progress
) -> tuple[Path, Path] | None:
    """Evaluate a recipe or an exported file; returns results.json and results.md, None in all processes but the first.

    A recipe is exported to `folder` first. Images stay in `folder`/original and `folder`/quantized and are not drawn
    again. Raises `InputError`, and `EnvironmentLacksError` where a runtime or a device is missing; a metric that cannot
    be computed is no error.
    """
    metrics = metrics_named(options.metrics)
    preset = get_preset(options.preset)
    shard = Shard.of_environment()
    prompts = _prompts(options, preset)
    refuse_file(folder, "a folder for the images and the results: -o DIR")
    if options.references is not None and not options.references.is_dir():
        raise InputError(f"{options.references}: no such folder; --reference-images has the real images")
    reports = progress if shard.is_first else NullProgress()
    with shard.joined():
        output = _exported(subject, folder, shard, reports)
        plan, transformer = _plan(output, prompts, preset, options, shard)
        settings: dict[str, Any] = {}
        if shard.is_first:
            settings = _settings(output, plan, options, preset, progress)
            claim_folder(folder, settings, (ORIGINAL, QUANTIZED))
        shard.wait()
        draw_images(plan, folder / ORIGINAL, plan.source.original, shard, reports)
        draw_images(plan, folder / QUANTIZED, lambda: transformer, shard, reports)
        shard.wait()
    # Outside: torchmetrics would wait for the other processes' share of every metric.
    if not shard.is_first:
        return None
    measured = _measured(folder, output, prompts, metrics, preset, options, progress)
    return Results(preset, settings, len(prompts), measured).write(folder, metrics)


def _prompts(options: EvaluateOptions, preset: Preset) -> list[Prompt]:
    every = read_prompts(options.prompts)
    preset.check(str(options.prompts), len(every))
    chosen = select(every, preset.count, preset.selection)
    return chosen[: options.count] if options.count is not None else chosen


def _exported(subject: str, folder: Path, shard: Shard, progress: Progress) -> Path:
    """The exported file: `subject` itself, or what the recipe `subject` is exported to, by the first process."""
    path = Path(subject)
    if path.suffix not in _RECIPE_SUFFIXES:
        return path
    output = folder / f"{path.stem}.onnx"
    if shard.is_first:
        from exporter.pipeline import export

        folder.mkdir(parents=True, exist_ok=True)
        export(load_recipe(subject), output, progress=progress)
    shard.wait()
    return output


def _plan(
    output: Path, prompts: Sequence[Prompt], preset: Preset, options: EvaluateOptions, shard: Shard
) -> tuple[DrawingPlan, EngineTransformer]:
    text = options.embeddings is None and prompts[0].text is not None
    source = DrawingSource.of_output(output, options.pipeline, text=text)
    device = shard.device(options.device or default_device(output))
    transformer = source.engine(output, device)
    refuse_latents(source.folder, int(transformer.config["in_channels"]))
    defaults = source.defaults
    settings = Settings(
        _first(options.steps, preset.steps, defaults.steps),
        _first(options.guidance, preset.guidance, defaults.guidance),
        transformer.latent_size,
    )
    plan = DrawingPlan(
        source=source,
        conditions=conditions_of(options, source, transformer.text_tokens),
        prompts=prompts,
        seeds=[preset.seed_of(prompt) for prompt in prompts],
        scheduler=_first(options.scheduler, preset.scheduler, defaults.scheduler),
        settings=settings,
        batch=fitting_batch(options.batch, transformer.engine, settings),
        device=transformer.device,
    )
    return plan, transformer


def refuse_latents(folder: PipelineFolder, channels: int) -> None:
    """Raise `InputError` where a transformer of so many channels draws latents that nothing in `folder` decodes."""
    if not folder.has_vae and channels not in PIXEL_CHANNELS:
        raise InputError(
            f"{folder.root}: has no autoencoder (vae/), so there are latents and no images to evaluate; give the whole "
            "pipeline's folder with --pipeline DIR"
        )


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def conditions_of(options: EvaluateOptions, source: DrawingSource, tokens: int | None) -> Conditions:
    """Embeddings or class labels, in the prompt list's order, or the list's texts.

    Raises `InputError` for labels that the model has not, and where list and embeddings differ in number.
    """
    every = read_prompts(options.prompts)
    file = options.embeddings
    if file is None and every[0].text is None:
        file = options.prompts
    if file is None:
        return source.texts([str(prompt.text) for prompt in every], "", tokens)
    embedded = source.conditions(file)
    if embedded.count != len(every):
        raise InputError(f"{file}: holds {embedded.count} embeddings, but {options.prompts} has {len(every)} prompts")
    return embedded


def _settings(
    output: Path, plan: DrawingPlan, options: EvaluateOptions, preset: Preset, progress: Progress
) -> dict[str, Any]:
    """All that the images depend on."""
    files = plan.source.files_drawn_with(text=isinstance(plan.conditions, Texts))
    return {
        "output": output.name,
        "output_sha256": checksum_of(output),
        "prompts_sha256": sha256_of(options.prompts),
        "embeddings_sha256": None if options.embeddings is None else sha256_of(options.embeddings),
        "preset": preset.name,
        "count": len(plan.prompts),
        "scheduler": plan.scheduler,
        "steps": plan.settings.steps,
        "guidance": plan.settings.guidance,
        "latent_size": list(plan.settings.latent_size),
        "batch": plan.batch,
        "pipeline": str(plan.source.folder.root.resolve()),
        "pipeline_sha256": _checksum(files, progress),
        "device": plan.device.type,
    }


def _checksum(files: Sequence[Path], progress: Progress) -> str:
    """SHA-256 of the files' names and contents."""
    digest = hashlib.sha256()
    with progress.task("checking the pipeline's files", len(files)) as task:
        for file in files:
            digest.update(f"{sha256_of(file)} {file.parent.name}/{file.name}\n".encode())
            task.advance()
    return digest.hexdigest()


def _measured(
    folder: Path,
    output: Path,
    prompts: Sequence[Prompt],
    metrics: Sequence[Metric],
    preset: Preset,
    options: EvaluateOptions,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    tools = Tools(options.device or default_device(output), preset.fid_mode, options.clip_model, options.pythons)
    names = tuple(f"{prompt.name}.png" for prompt in prompts)
    texts = None if prompts[0].text is None else tuple(str(prompt.text) for prompt in prompts)
    original, quantized = folder / ORIGINAL, folder / QUANTIZED
    rows = {
        "original": Pictures(original, names, texts, None, options.references),
        output.name: Pictures(quantized, names, texts, original, options.references),
    }
    return {
        label: {
            metric.name: measure(metric, pictures, tools, progress)
            for metric in metrics
            if pictures.originals is not None or not metric.paired
        }
        for label, pictures in rows.items()
    }
