"""The stages of calibration: captured inputs, formats that were left open, and the weights, kept unit by unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from exporter.calibration.calibrate import calibrate, check_batches
from exporter.calibration.capture import CalibrationSet, capture_trajectories
from exporter.calibration.finished import UnitFiles
from exporter.calibration.format_choice import choose_formats, load_formats, save_formats
from exporter.calibration.step_weights import trajectory_weights
from exporter.job import Job
from exporter.onnx_files import checksum_of
from exporter.quantize import CalibrationResult, load_quantized, save_quantized
from exporter.sampling import make_scheduler
from exporter.source import Source
from exporter.stage_settings import (
    calibration_settings,
    captured_file,
    changes_of_model,
    formats_file,
    weights_file,
)
from exporter.workdir import key_of, verb


def captured_inputs(job: Job, source: Source) -> CalibrationSet:
    """The transformer's inputs along real sampler trajectories, for calibration and for the gate.

    Raises `InputError` where another recipe's calibration was interrupted, whose units would be forgotten, and where
    the inputs could not be shared out among the processes that calibrate.
    """
    settings = job.recipe.calibration
    check_batches(job.recipe.method, settings.inputs, job.shard)
    _refuse_unfinished(job, source)
    return capture(job, source, captured_file(job, source), trajectories=settings.samples, seed=settings.seed)


def capture(job: Job, source: Source, file: Path, *, trajectories: int, seed: int) -> CalibrationSet:
    """Trajectories of the original model, sealed as `file` in the work folder."""
    settings = job.recipe.calibration

    def make(path: Path) -> None:
        with source.placement.computing():
            capture_trajectories(
                source.model,
                source.adapter,
                source.prompts,
                settings,
                job.progress,
                trajectories=trajectories,
                seed=seed,
                latent_shape=source.latent_shape,
                scheduler_config=source.files.scheduler,
                placement=source.placement,
            ).save(path)

    key = key_of(
        stage="capture",
        model=source.identity,
        shape=source.latent_shape,
        settings=settings.sampler,
        device=source.placement.device.type,
        trajectories=trajectories,
        seed=seed,
    )
    path, reused = job.work.obtain(file.name, key, make)
    captured = CalibrationSet.load(path)
    job.progress.note(f"{verb(reused, 'captured')} {len(captured)} inputs of {trajectories} trajectories")
    return captured


def formats_chosen(job: Job, source: Source, captured: CalibrationSet) -> Source:
    """The same with a format for every layer that `weight: auto` leaves open.

    The candidates' errors are sealed in the work folder, where processes other than the first read them.
    """
    if not source.plan.open:
        return source
    file = formats_file(job, source)
    if not job.shard.is_first:
        return _decided(source, file)

    def make(path: Path) -> None:
        run = source.calibration_run(captured, sample_weights(job, source, captured))
        with source.placement.computing():
            save_formats(path, choose_formats(source.model, source.plan, run, job.recipe.method, job.progress))

    path, reused = job.work.obtain(file.name, _formats_key(job, source), make)
    decided = _decided(source, path)
    counts = Counter(layer.chosen for layer in decided.formats)
    numbers = ", ".join(f"{fmt} {count}" for fmt, count in counts.most_common())
    job.progress.note(f"{verb(reused, 'chose')} formats of {len(decided.formats)} layers: {numbers}")
    return decided


def _formats_key(job: Job, source: Source) -> str:
    return key_of(stage="formats", **calibration_settings(job, source))


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


def calibrated_weights(job: Job, source: Source, captured: CalibrationSet) -> CalibrationResult:
    """Codes and scales of every planned layer, sealed in the work folder; until all are there, unit by unit."""
    units = _unit_files(job, source, _made_of(job, source))

    def make(path: Path) -> None:
        units.begin()
        job.shard.agree(True)
        save_quantized(path, _calibrated(job, source, captured, units), source.plan)

    path, reused = job.work.obtain(weights_file(job, source).name, calibration_key(job, source), make)
    if reused:
        job.shard.agree(False)
    units.remove()
    earlier = f", {units.found} units of an earlier run" if units.found else ""
    job.progress.note(
        f"{verb(reused, 'calibrated')} {len(source.plan.layers)} layers ({job.recipe.method.name}){earlier}"
    )
    return load_quantized(path, source.plan)


def _refuse_unfinished(job: Job, source: Source) -> None:
    """Before anything takes long, raise `InputError` where another recipe's calibration was interrupted.

    Not where this one's weights are there, which takes nothing away from the other one, as the next target of a bundle.
    Formats that are open are those that were chosen earlier; where none were, no units can be this recipe's.
    """
    formats = formats_file(job, source)
    if source.plan.open and job.work.is_current(formats, _formats_key(job, source)):
        source = _decided(source, formats)
    units = _unit_files(job, source)
    if units.others() and not _has_weights(job, source):
        units.refuse_others()


def _has_weights(job: Job, source: Source) -> bool:
    """Whether they are there, made by this program, and what they were made beside."""
    beside = [file.is_file() for file in changes_of_model(job, source)]
    return all(beside) and job.work.is_current(weights_file(job, source), calibration_key(job, source))


def assist_calibration(job: Job, source: Source, captured: CalibrationSet) -> None:
    """What processes other than the first do while it runs `calibrated_weights`, unless these are finished."""
    if job.shard.agree(False):
        _calibrated(job, source, captured, _unit_files(job, source, _made_of(job, source)))


def _calibrated(job: Job, source: Source, captured: CalibrationSet, units: UnitFiles) -> CalibrationResult:
    units.check_shared()
    with source.placement.computing():
        run = source.calibration_run(captured, sample_weights(job, source, captured), job.shard)
        seed = job.recipe.calibration.seed
        result = calibrate(source.model, source.plan, run, job.recipe.method, seed, job.progress, units)
    # The first process removes the units' files next, which the others may still be reading.
    job.shard.wait()
    return result


def _made_of(job: Job, source: Source) -> list[str]:
    """Checksums of what units are made of: where a stage before them gives something else, they do not fit."""
    return [checksum_of(file) for file in (captured_file(job, source), *changes_of_model(job, source))]


def _unit_files(job: Job, source: Source, made_of: Sequence[str] = ()) -> UnitFiles:
    return UnitFiles(job.work, source.plan, calibration_settings(job, source), job.shard, made_of)


def calibration_key(job: Job, source: Source) -> str:
    """The key of the calibrated weights, on which all later stages depend.

    Weights fit the changed model that they were made for, to the last bit: other machines may change it otherwise.
    """
    model = [checksum_of(file) for file in changes_of_model(job, source)]
    return key_of(stage="calibrate", changed_model=model, **calibration_settings(job, source))
