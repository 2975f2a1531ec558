"""What calibration goes by beside the recipe, found on the captured inputs."""

from __future__ import annotations

from torch import Tensor

from exporter.calibration.capture import CalibrationSet
from exporter.calibration.step_weights import trajectory_weights
from exporter.job import Job
from exporter.sampling import make_scheduler
from exporter.source import Source


def sample_weights(job: Job, source: Source, captured: CalibrationSet) -> Tensor | None:
    """What errors on the captured inputs count, by `method.step_weights`; None: all alike."""
    if job.recipe.method.step_weights == "uniform":
        return None
    settings = job.recipe.calibration
    scheduler = make_scheduler(
        settings.scheduler, source.files.scheduler, settings.steps, source.adapter.training_noise
    )
    return trajectory_weights(captured, scheduler, settings.guidance)
