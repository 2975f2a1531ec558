"""The work folder's files up to the calibrated weights, and what each depends on.

A file is named by all that decides it but for the program, so that no recipe replaces another's in a folder that both
use, and sealed under that and the program, another version of which replaces its own. What an interrupted calibration
is made of stays until it goes on: its units fit nothing else, and not every device makes the same inputs again to the
last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.job import Job
from exporter.onnx_files import checksum_of
from exporter.source import Source
from exporter.workdir import QUANTIZED, WorkDir, key_of, name_for

Settings = dict[str, Any]
"""JSON values by name."""


@dataclass(frozen=True)
class StageFile:
    """A sealed file of the work folder and the key that it is sealed under."""

    work: WorkDir
    name: str
    key: str

    @property
    def path(self) -> Path:
        """Where it is, or will be."""
        return self.work.file(self.name)

    def is_current(self) -> bool:
        """Whether it is there, whole, and may be reused."""
        return self.work.is_current(self.path, self.key)

    def obtain(self, make: Callable[[Path], None]) -> bool:
        """Have it made, at a temporary path, unless it is current; whether it was."""
        return self.work.obtain(self.name, self.key, make)[1]


def model_settings(job: Job, source: Source) -> Settings:
    """What the original model and its prompts depend on."""
    return {
        "files": source.identity,
        "model": job.recipe.model.model_dump(include={"family", "inputs", "blocks"}),
        "latent_shape": source.latent_shape,
    }


def captured_settings(job: Job, source: Source) -> Settings:
    """What captured inputs depend on."""
    return {
        **model_settings(job, source),
        "calibration": job.recipe.calibration.captured,
        "device": source.placement.device.type,
    }


def captured_file(job: Job, source: Source) -> StageFile:
    """The inputs for calibration."""
    return _stage_file(job, "calibration", ".safetensors", captured_settings(job, source))


def balance_file(job: Job, source: Source) -> StageFile | None:
    """What balances the channels; None where nothing does."""
    balance = job.recipe.method.balance
    settings = {**captured_settings(job, source), "balance": balance}
    return _stage_file(job, "balance", ".safetensors", settings) if balance else None


def branch_ranks(source: Source) -> dict[str, int]:
    """Ranks of the branches by the layer's module path in the model as it was loaded."""
    return {layer.original_name: layer.low_rank for layer in source.plan.layers if layer.low_rank}


def low_rank_file(job: Job, source: Source) -> StageFile | None:
    """The branches of low rank, which are of the balanced model; None without any."""
    ranks = branch_ranks(source)
    balance = balance_file(job, source)
    settings = {**model_settings(job, source), "ranks": ranks, "balance": balance and balance.name}
    return _stage_file(job, "low_rank", ".safetensors", settings) if ranks else None


def calibration_settings(job: Job, source: Source) -> Settings:
    """What the calibrated weights depend on, and the formats that are chosen for them. The method's `effort` is but a
    word for others of its settings."""
    return {
        **captured_settings(job, source),
        "method": job.recipe.method.model_dump(exclude={"effort"}),
        "layers": source.layer_facts(),
    }


def formats_file(job: Job, source: Source) -> StageFile:
    """The formats that are chosen for what `source` leaves open."""
    return _stage_file(job, "formats", ".json", calibration_settings(job, source))


def changes_of_model(job: Job, source: Source) -> list[StageFile]:
    """What is changed in the model before it is calibrated."""
    changes = balance_file(job, source), low_rank_file(job, source)
    return [file for file in changes if file is not None]


def weights_file(job: Job, source: Source) -> StageFile:
    """The calibrated weights.

    They fit the changed model that they were made for, to the last bit, so that its files have to be there: other
    machines may change it otherwise.
    """
    changed = [checksum_of(file.path) for file in changes_of_model(job, source)]
    return _stage_file(job, QUANTIZED, ".safetensors", calibration_settings(job, source), changed_model=changed)


def _stage_file(job: Job, stem: str, suffix: str, settings: Settings, **in_key: object) -> StageFile:
    """Named by its settings; what is `in_key` alone makes the file outdated."""
    return StageFile(job.work, name_for(stem, suffix, settings), key_of(stage=stem, **settings, **in_key))
