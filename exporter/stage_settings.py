"""What the stages up to the calibrated weights depend on beside the program: JSON values by name.

A stage's file is named and keyed by all of them, so that no recipe replaces another's files in a work folder that both
use. What an interrupted calibration is made of stays until it goes on: its units fit nothing else, and not every device
makes the same inputs again to the last bit. Another version of the program replaces its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.job import Job
from exporter.source import Source
from exporter.workdir import QUANTIZED, name_for


def captured_settings(job: Job, source: Source) -> dict[str, Any]:
    """Of the captured inputs."""
    return {
        "model": source.identity,
        "latent_shape": source.latent_shape,
        "calibration": job.recipe.calibration.captured,
        "device": source.placement.device.type,
    }


def captured_file(job: Job, source: Source) -> Path:
    """The captured inputs."""
    return job.work.file(name_for("calibration", ".safetensors", captured_settings(job, source)))


def balance_settings(job: Job, source: Source) -> dict[str, Any] | None:
    """Of what balances the channels; None where nothing does."""
    balance = job.recipe.method.balance
    return {**captured_settings(job, source), "balance": balance} if balance else None


def balance_file(job: Job, source: Source) -> Path:
    """What balances the channels."""
    return job.work.file(name_for("balance", ".safetensors", balance_settings(job, source)))


def low_rank_settings(job: Job, source: Source) -> dict[str, Any] | None:
    """Of the branches of low rank, which are of the balanced model, by the layers' original names; None without any."""
    ranks = {layer.original_name: layer.low_rank for layer in source.plan.layers if layer.low_rank}
    return {"model": source.identity, "ranks": ranks, "balanced": balance_settings(job, source)} if ranks else None


def low_rank_file(job: Job, source: Source) -> Path:
    """The branches of low rank."""
    return job.work.file(name_for("low_rank", ".safetensors", low_rank_settings(job, source)))


def calibration_settings(job: Job, source: Source) -> dict[str, Any]:
    """Of the calibrated weights, and of the formats that are chosen for them."""
    return {
        **captured_settings(job, source),
        "method": job.recipe.method.model_dump(),
        "layers": source.layer_facts(),
    }


def formats_file(job: Job, source: Source) -> Path:
    """The formats that are chosen for what `source` leaves open."""
    return job.work.file(name_for("formats", ".json", calibration_settings(job, source)))


def weights_file(job: Job, source: Source) -> Path:
    """The calibrated weights."""
    return job.work.file(name_for(QUANTIZED, ".safetensors", calibration_settings(job, source)))


def changes_of_model(job: Job, source: Source) -> list[Path]:
    """Files with what is changed in the model before it is calibrated."""
    balance, low_rank = balance_settings(job, source), low_rank_settings(job, source)
    return [balance_file(job, source)] * bool(balance) + [low_rank_file(job, source)] * bool(low_rank)
