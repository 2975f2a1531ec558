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
from exporter.stage_files import (
    StageFile,
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
    check_batches(job.recipe.method, job.recipe.calibration.inputs, job.shard)
    _refuse_unfinished(job, source)
    return capture(job, source, captured_file(job, source))


def capture(job: Job, source: Source, file: StageFile) -> CalibrationSet:
    """The original model's inputs along the recipe's trajectories, sealed as `file`."""
    settings = job.recipe.calibration

    def make(path: Path) -> None:
        with source.placement.computing():
            capture_trajectories(
                source.model,
                source.adapter,
                source.prompts,
                settings,
                job.progress,
                trajectories=settings.samples,
                seed=settings.seed,
                latent_shape=source.latent_shape,
                scheduler_config=source.files.scheduler,
                placement=source.placement,
            ).save(path)

    reused = file.obtain(make)
    captured = CalibrationSet.load(file.path)
    job.progress.note(f"{verb(reused, 'captured')} {len(captured)} inputs of {settings.samples} trajectories")
    return captured


def formats_chosen(job: Job, source: Source, captured: CalibrationSet) -> Source:
    """The same with a format for every layer that `weight: auto` leaves open.

    The candidates' errors are sealed in the work folder, where processes other than the first read them.
    """
    if not source.plan.open:
        return source
    file = formats_file(job, source)
    if not job.shard.is_first:
        return _decided(source, file.path)

    def make(path: Path) -> None:
        run = source.calibration_run(captured, sample_weights(job, source, captured))
        with source.placement.computing():
            save_formats(path, choose_formats(source.model, source.plan, run, job.recipe.method, job.progress))

    reused = file.obtain(make)
    decided = _decided(source, file.path)
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


def calibrated_weights(job: Job, source: Source, captured: CalibrationSet) -> CalibrationResult:
    """Codes and scales of every planned layer, sealed in the work folder; until all are there, unit by unit."""
    units = _unit_files(job, source, _made_of(job, source))
    file = weights_file(job, source)

    def make(path: Path) -> None:
        # Again: by now every layer has its format.
        units.refuse_others()
        units.begin()
        job.shard.agree(True)
        save_quantized(path, _calibrated(job, source, captured, units), source.plan)

    reused = file.obtain(make)
    if reused:
        job.shard.agree(False)
    units.remove()
    earlier = f", {units.found} units of an earlier run" if units.found else ""
    job.progress.note(
        f"{verb(reused, 'calibrated')} {len(source.plan.layers)} layers ({job.recipe.method.name}){earlier}"
    )
    return load_quantized(file.path, source.plan)


def _refuse_unfinished(job: Job, source: Source) -> None:
    """Before anything is made anew, raise `InputError` where another recipe's calibration was interrupted.

    Not where this one's weights are there, and all that they are made of: that takes nothing away from the other one,
    as the next target of a bundle.
    """
    formats = formats_file(job, source)
    if source.plan.open and formats.is_current():
        source = _decided(source, formats.path)
    units = _unit_files(job, source)
    if job.work.fresh:
        units.remove_all()
    elif units.others() and not _is_calibrated(job, source):
        units.refuse_others()


def _is_calibrated(job: Job, source: Source) -> bool:
    made_of = captured_file(job, source), *changes_of_model(job, source)
    return all(file.is_current() for file in made_of) and weights_file(job, source).is_current()


def shared_key(job: Job, source: Source) -> str:
    """What all processes that calibrate together have in common, of the source as it was loaded: those with another
    one would look for other files."""
    return key_of(**calibration_settings(job, source))


def assist_calibration(job: Job, source: Source, captured: CalibrationSet) -> None:
    """What processes other than the first do while it runs `calibrated_weights`, unless these are finished."""
    if job.shard.agree(False):
        _calibrated(job, source, captured, _unit_files(job, source, _made_of(job, source)))


def _calibrated(job: Job, source: Source, captured: CalibrationSet, units: UnitFiles) -> CalibrationResult:
    with source.placement.computing():
        run = source.calibration_run(captured, sample_weights(job, source, captured), job.shard)
        seed = job.recipe.calibration.seed
        result = calibrate(source.model, source.plan, run, job.recipe.method, seed, job.progress, units)
    # The first process removes the units' files next, which the others may still be reading.
    job.shard.wait()
    return result


def _made_of(job: Job, source: Source) -> list[str]:
    """Checksums of what units are made of: where a stage before them gives something else, they do not fit."""
    return [checksum_of(file.path) for file in (captured_file(job, source), *changes_of_model(job, source))]


def _unit_files(job: Job, source: Source, made_of: Sequence[str] = ()) -> UnitFiles:
    return UnitFiles(job.work, source.plan, calibration_settings(job, source), job.shard, made_of)
