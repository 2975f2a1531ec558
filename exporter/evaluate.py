"""What the finished engine is worth: noise predictions, layers and samples beside the original's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exporter.calibration.capture import CalibrationSet
from exporter.calibration.replay import Recorded, Replay
from exporter.calibration_stages import capture
from exporter.gate.segments import SegmentedSession, is_large
from exporter.images import SampleGrids, sample_grids
from exporter.job import Job
from exporter.memory import release_mapped_weights, return_freed_memory
from exporter.models.inputs import TransformerInputs
from exporter.onnx_files import read_model
from exporter.passes.layer_table import read_layer_table
from exporter.passes.tiling import untiled
from exporter.quality import (
    BATCH,
    LayerQuality,
    NoiseSnr,
    class_accuracy,
    collected_rows,
    layer_quality,
    noise_prediction_snr,
)
from exporter.runtime import OnnxSession
from exporter.runtime.arena import renew_arena
from exporter.sampling import Denoiser, DenoiserCall, make_scheduler, sample, samples_at_once
from exporter.scale_comparison import LayerScales, compare_scales
from exporter.source import Source
from exporter.stage_files import StageFile, captured_settings, model_settings
from exporter.workdir import key_of


@dataclass(frozen=True)
class Evaluation:
    """Measured on the lowered graph in ONNX Runtime; accuracies are None without a classifier."""

    noise: NoiseSnr
    layers: tuple[LayerQuality, ...]
    scales: tuple[LayerScales, ...]
    grids: SampleGrids
    accuracy_original: float | None
    accuracy_quantized: float | None


def evaluate(job: Job, source: Source, quantized: nn.Module, lowered: Path) -> Evaluation:
    """Compare the original with the lowered graph on held-out trajectories and on samples from the same seeds."""
    settings = job.recipe.evaluation
    held_out = held_out_inputs(job, source)
    judged = settings.samples if settings.classifier is not None else settings.grid
    count = max(judged, settings.grid)
    original = Recorded(source.denoiser)
    engine = graph_denoiser(source, cache(partial(open_graph, source, lowered)))
    at_once = min(BATCH, samples_at_once(_tokens(source), guidance=1.0))
    with collected_rows(source.model, source.plan, math.ceil(len(held_out) / at_once)) as inputs:
        noise = noise_prediction_snr(original, engine, held_out, source.prompts, job.progress, batch_size=at_once)
    theirs = original_samples(job, source, count, Replay(held_out, original.predictions))
    ours = samples(job, source, engine, count)
    # A large graph's weights leave the memory before the layers' come.
    del engine
    renew_arena()
    return_freed_memory()
    layers = layer_quality(source.model, quantized, source.plan, inputs)
    scales = compare_scales(source.model, source.plan.layers, inputs, job.recipe.method, job.target)
    return Evaluation(
        noise=noise,
        layers=layers,
        scales=scales,
        grids=sample_grids(theirs[: settings.grid], ours[: settings.grid]),
        accuracy_original=accuracy(job, source, theirs[:judged]),
        accuracy_quantized=accuracy(job, source, ours[:judged]),
    )


def held_out_inputs(job: Job, source: Source) -> CalibrationSet:
    """The transformer's inputs along trajectories that calibration has not seen, at every step."""
    held_out = {"samples": job.recipe.evaluation.trajectories, "seed": _held_out_seed(job)}
    calibration = job.recipe.calibration.whole.model_copy(update=held_out)
    other = replace(job, recipe=job.recipe.model_copy(update={"calibration": calibration}))
    key = key_of(stage="held out", **captured_settings(other, source))
    return capture(other, source, StageFile(job.work, "held_out.safetensors", key))


def _held_out_seed(job: Job) -> int:
    """A seed whose trajectories, one per following integer, calibration has not used."""
    calibration = job.recipe.calibration
    return calibration.seed + calibration.samples + job.recipe.evaluation.seed


def open_graph(source: Source, lowered: Path) -> OnnxSession | SegmentedSession:
    """The lowered graph ready to run, a large one segment by segment."""
    model = read_model(lowered, external_data=False)
    if not is_large(read_layer_table(model)):
        return OnnxSession(lowered)
    blocks = [name for name, _ in source.adapter.blocks(source.model)]
    return SegmentedSession(untiled(model), blocks, lowered.parent)


def graph_denoiser(source: Source, session: Callable[[], OnnxSession | SegmentedSession]) -> Denoiser:
    """The noise prediction of an exported graph, whose `session` is asked for when it is to run: not before, since the
    original may have filled the memory."""

    def denoise(inputs: TransformerInputs) -> Tensor:
        complete = source.adapter.with_conditions(source.model, inputs)
        raw = session().run(complete.as_numpy())["sample"]
        return torch.from_numpy(source.adapter.noise_prediction(raw, source.model))

    return denoise


def original_samples(job: Job, source: Source, count: int, replay: Replay) -> Tensor:
    """`samples` of the original model, sealed in the work folder, since they are the same for every target.

    The first begin where the held-out trajectories do, whose noise predictions are known; the model makes the others.
    """
    known = min(count, job.recipe.evaluation.trajectories)
    key = key_of(
        stage="samples",
        **model_settings(job, source),
        sampler=job.recipe.calibration.whole.sampler,
        seed=_held_out_seed(job),
        count=count,
        known=known,
    )

    def make(path: Path) -> None:
        parts = [samples(job, source, replay, known, record=replay.note)]
        if count > known:
            parts.append(samples(job, source, source.denoiser, count, first=known))
            # A large original leaves the memory before the other model runs on.
            release_mapped_weights()
        save_file({"samples": torch.cat(parts)}, path)

    path, _ = job.work.obtain("samples.safetensors", key, make)
    return load_file(path)["samples"]


def samples(
    job: Job,
    source: Source,
    denoiser: Denoiser,
    count: int,
    *,
    first: int = 0,
    record: Callable[[DenoiserCall], None] | None = None,
) -> Tensor:
    """Guided samples float32 [count − first, C, H, W], prompts taken in turn, from held-out seeds; see `sample`."""
    settings = job.recipe.calibration
    return sample(
        denoiser,
        source.prompts,
        prompt_order(source, count)[first:],
        make_scheduler(settings.scheduler, source.files.scheduler, settings.steps, source.adapter.training_noise),
        steps=settings.steps,
        guidance=settings.guidance,
        seed=_held_out_seed(job) + first,
        latent_shape=source.latent_shape,
        progress=job.progress,
        batch_size=samples_at_once(_tokens(source), settings.guidance),
        record=record,
    )


def _tokens(source: Source) -> int:
    return source.adapter.tokens(source.model, source.latent_shape)


def prompt_order(source: Source, count: int) -> Tensor:
    """Prompt indices 0, 1, …, P−1, 0, 1, … int64 [count]."""
    return torch.arange(count) % source.prompts.count


def accuracy(job: Job, source: Source, images: Tensor) -> float | None:
    """Fraction of samples that the recipe's classifier takes for what was asked; None without a classifier."""
    given = job.recipe.evaluation.classifier
    labels = source.prompts.labels
    if given is None or labels is None:
        return None
    return class_accuracy(images, labels[prompt_order(source, len(images))], job.recipe.resolve_path(given))
