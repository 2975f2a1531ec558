"""The stages that change the loaded model before it is quantized, so that it computes the same and loses less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from exporter.calibration.balance import Balance, find_balance
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.inputs import CalibrationRun
from exporter.job import Job
from exporter.source import Source
from exporter.workdir import key_of, verb

BALANCE = "balance.safetensors"


def balanced(job: Job, source: Source, captured: CalibrationSet) -> Source:
    """The same with `method.balance`: the model computes what it did, up to rounding, with inputs that quantize better.

    What was found is sealed in the work folder, where processes other than the first read it.
    """
    if not job.recipe.method.balance:
        return source
    folds = source.adapter.channel_folds(source.model)
    if not job.shard.is_first:
        return replace(source, model=Balance.load(job.work.file(BALANCE), folds).applied(source.model, folds))

    def make(path: Path) -> None:
        place = source.placement
        run = CalibrationRun(source.adapter, captured, source.prompts, limit=place.limit(), placement=place)
        with place.computing():
            find_balance(run, source.model, folds, powers_of_two=job.recipe.method.balance == "exact").save(path)

    key = key_of(
        stage="balance",
        model=source.identity,
        shape=source.latent_shape,
        calibration=job.recipe.calibration.captured,
        balance=job.recipe.method.balance,
        device=source.placement.device.type,
    )
    path, reused = job.work.obtain(BALANCE, key, make)
    job.progress.note(f"{verb(reused, 'balanced')} {sum(len(fold.readers) for fold in folds)} inputs")
    return replace(source, model=Balance.load(path, folds).applied(source.model, folds))
