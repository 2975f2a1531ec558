"""The stages that change the loaded model before it is quantized, so that it computes the same and loses less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporter.calibration.balance import Balance, find_balance
from exporter.calibration.capture import CalibrationSet
from exporter.describe import transforms_text
from exporter.job import Job
from exporter.source import Source
from exporter.transforms.apply import find_low_rank, load_low_rank, save_low_rank, with_transforms
from exporter.transforms.low_rank import LowRank
from exporter.workdir import key_of, name_for, verb


def balanced(job: Job, source: Source, captured: CalibrationSet) -> Source:
    """The same with `method.balance`: the model computes what it did, up to rounding, with inputs that quantize better.

    What was found is sealed in the work folder, where processes other than the first read it.
    """
    if not job.recipe.method.balance:
        return source
    folds = source.adapter.channel_folds(source.model)
    name = _balance_name(job)
    if not job.shard.is_first:
        return replace(source, model=Balance.load(job.work.file(name), folds).applied(source.model, folds))

    def make(path: Path) -> None:
        run = source.calibration_run(captured)
        with source.placement.computing():
            find_balance(run, source.model, folds, powers_of_two=job.recipe.method.balance == "exact").save(path)

    key = key_of(
        stage="balance",
        model=source.identity,
        shape=source.latent_shape,
        calibration=job.recipe.calibration.captured,
        balance=job.recipe.method.balance,
        device=source.placement.device.type,
    )
    path, reused = job.work.obtain(name, key, make)
    job.progress.note(f"{verb(reused, 'balanced')} {sum(len(fold.readers) for fold in folds)} inputs")
    return replace(source, model=Balance.load(path, folds).applied(source.model, folds))


def changes_of_model(job: Job, source: Source) -> list[str]:
    """Names of the work folder's files with what `balanced` and `transformed` found."""
    return [_balance_name(job)] * bool(job.recipe.method.balance) + [_low_rank_name(job, source)] * bool(_ranks(source))


def _balance_name(job: Job) -> str:
    """Named by what decides it, as the captured inputs are."""
    return name_for("balance", ".safetensors", _balanced_by(job))


def _balanced_by(job: Job) -> list[Any]:
    return [job.recipe.method.balance, job.recipe.calibration.captured]


def transformed(job: Job, source: Source) -> Source:
    """The same with the rotations and branches of low rank that the recipe's rules ask for: the model computes what it
    did, up to rounding."""
    layers = [layer for layer in source.plan.layers if layer.is_transformed]
    if not layers:
        return source
    ranks = _ranks(source)
    branches = _branches(job, source, ranks) if ranks else {}
    job.progress.note(f"transformed layers: {transforms_text(layers)}")
    return replace(source, model=with_transforms(source.model, layers, branches))


def _branches(job: Job, source: Source, ranks: Mapping[str, int]) -> Mapping[str, LowRank]:
    """Sealed in the work folder, where processes other than the first read them."""
    name = _low_rank_name(job, source)
    if job.shard.is_first:
        # What balancing changed depends also on the device that saw the captured inputs.
        balance = [*_balanced_by(job), source.placement.device.type] if job.recipe.method.balance else None
        key = key_of(stage="low rank", model=source.identity, shape=source.latent_shape, balance=balance, ranks=ranks)
        job.work.obtain(name, key, lambda path: save_low_rank(path, find_low_rank(source.model, ranks, job.progress)))
    return load_low_rank(job.work.file(name), ranks)


def _ranks(source: Source) -> dict[str, int]:
    """By the layer's module path in the model as it was loaded."""
    return {layer.original_name: layer.low_rank for layer in source.plan.layers if layer.low_rank}


def _low_rank_name(job: Job, source: Source) -> str:
    balance = _balanced_by(job) if job.recipe.method.balance else None
    return name_for("low_rank", ".safetensors", [_ranks(source), balance])
