"""The stages that change the loaded model before it is quantized, so that it computes the same and loses less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from exporter.calibration.balance import Balance, find_balance
from exporter.calibration.capture import CalibrationSet
from exporter.describe import transforms_text
from exporter.job import Job
from exporter.source import Source
from exporter.stage_files import StageFile, balance_file, branch_ranks, low_rank_file
from exporter.transforms.apply import find_low_rank, load_low_rank, save_low_rank, with_transforms
from exporter.transforms.low_rank import LowRank
from exporter.workdir import verb


def balanced(job: Job, source: Source, captured: CalibrationSet) -> Source:
    """The same with `method.balance`: the model computes what it did, up to rounding, with inputs that quantize better.

    What was found is sealed in the work folder, where processes other than the first read it.
    """
    file = balance_file(job, source)
    if file is None:
        return source
    folds = source.adapter.channel_folds(source.model)
    if not job.shard.is_first:
        return replace(source, model=Balance.load(file.path, folds).applied(source.model, folds))

    def make(path: Path) -> None:
        run = source.calibration_run(captured)
        with source.placement.computing():
            find_balance(run, source.model, folds, powers_of_two=job.recipe.method.balance == "exact").save(path)

    reused = file.obtain(make)
    job.progress.note(f"{verb(reused, 'balanced')} {sum(len(fold.readers) for fold in folds)} inputs")
    return replace(source, model=Balance.load(file.path, folds).applied(source.model, folds))


def transformed(job: Job, source: Source) -> Source:
    """The same with the rotations and branches of low rank that the recipe's rules ask for: the model computes what it
    did, up to rounding."""
    layers = [layer for layer in source.plan.layers if layer.is_transformed]
    if not layers:
        return source
    file = low_rank_file(job, source)
    branches = _branches(job, source, file) if file is not None else {}
    job.progress.note(f"transformed layers: {transforms_text(layers)}")
    return replace(source, model=with_transforms(source.model, layers, branches))


def _branches(job: Job, source: Source, file: StageFile) -> Mapping[str, LowRank]:
    """Sealed in the work folder, where processes other than the first read them."""
    ranks = branch_ranks(source)
    if job.shard.is_first:
        file.obtain(lambda path: save_low_rank(path, find_low_rank(source.model, ranks, job.progress)))
    return load_low_rank(file.path, ranks)
