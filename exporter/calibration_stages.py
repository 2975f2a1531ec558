"""What calibration goes by beside the recipe, found on the captured inputs: formats left open, samples' weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from exporter.calibration.capture import CalibrationSet
from exporter.calibration.format_choice import choose_formats, load_formats, save_formats
from exporter.calibration.step_weights import trajectory_weights
from exporter.job import Job
from exporter.sampling import make_scheduler
from exporter.source import Source
from exporter.workdir import key_of, name_for, verb


def formats_chosen(job: Job, source: Source, captured: CalibrationSet) -> Source:
    """The same with a format for every layer that `weight: auto` leaves open.

    The candidates' errors are sealed in the work folder, where processes other than the first read them.
    """
    plan = source.plan
    if not plan.open:
        return source
    name = name_for("formats", ".json", source.layer_facts())
    if not job.shard.is_first:
        return _decided(source, job.work.file(name))

    def make(path: Path) -> None:
        run = source.calibration_run(captured, sample_weights(job, source, captured))
        with source.placement.computing():
            save_formats(path, choose_formats(source.model, plan, run, job.recipe.method, job.progress))

    key = key_of(
        stage="formats",
        model=source.identity,
        shape=source.latent_shape,
        calibration=job.recipe.calibration.captured,
        device=source.placement.device.type,
        method=job.recipe.method.model_dump(),
        layers=source.layer_facts(),
    )
    path, reused = job.work.obtain(name, key, make)
    decided = _decided(source, path)
    counts = Counter(layer.chosen for layer in decided.formats)
    numbers = ", ".join(f"{fmt} {count}" for fmt, count in counts.most_common())
    job.progress.note(f"{verb(reused, 'chose')} formats of {len(decided.formats)} layers: {numbers}")
    return decided


def _decided(source: Source, path: Path) -> Source:
    found = load_formats(path)
    return replace(source, plan=source.plan.decided({layer.layer: layer.chosen for layer in found}), formats=found)


def sample_weights(job: Job, source: Source, captured: CalibrationSet) -> Tensor | None:
    """What errors on the captured inputs count, by `method.step_weights`; None: all alike."""
    if job.recipe.method.step_weights == "uniform":
        return None
    settings = job.recipe.calibration
    scheduler = make_scheduler(
        settings.scheduler, source.files.scheduler, settings.steps, source.adapter.training_noise
    )
    return trajectory_weights(captured, scheduler, settings.guidance)
