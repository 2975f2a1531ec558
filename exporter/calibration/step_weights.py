"""How much every captured input counts: by how far an error in its noise prediction moves the finished sample."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exporter.calibration.capture import CalibrationSet

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# Of the prediction, for which the response is looked for: small, so that a sampler that clips samples does not.
_IMPULSE = 2.0**-10


def step_responses(scheduler: SchedulerMixin) -> Tensor:
    """How far an error of 1 in one step's prediction moves the finished sample, float64 [steps].

    Samplers are linear in the sample and in the predictions, so their own `step` gives it exactly, on a single number:
    with x_0 = 0 and predictions e_j = r_j·x_j + δ_ij, c_i is the x after the last step. r_j·x is how later predictions
    answer a sample that has moved: the best guess for Gaussian data of variance 1, which of the noise is σ_j·x (x of
    variance α_j² + σ_j² = 1). Without an answer the first steps would count a hundred times as much as the last. In
    DDIM, with tan φ_j = σ_j / α_j,

        c_i = −sin(φ_i − φ_{i+1}) / cos φ_i · Π_{j>i} cos(φ_j − φ_{j+1}).

    Samplers that add noise draw the same with and without the error.
    """
    steps = len(_timesteps(scheduler))
    unmoved = _finished(scheduler, None)
    moved = [_finished(scheduler, step) for step in range(steps)]
    return (torch.tensor(moved, dtype=torch.float64) - unmoved) / _IMPULSE


def trajectory_weights(captured: CalibrationSet, scheduler: SchedulerMixin, guidance: float) -> Tensor:
    """What the squared errors of all captured inputs count, float32 [M], 1 on average.

    Squares of the steps' responses; with guidance g times g² with the prompt and (g − 1)² without, since the two
    predictions are added as g·e_c − (g − 1)·e_u. `scheduler` must be set to the steps of the capture.
    """
    weights = step_responses(scheduler)[captured.step_index].square()
    if guidance != 1.0:
        conditional = captured.prompt_index >= 0
        weights = weights * torch.where(conditional, guidance**2, (guidance - 1.0) ** 2)
    return (weights / weights.mean()).float()


def _finished(scheduler: Any, moved_step: int | None) -> float:
    """The sample after all steps when the prediction of one of them is off by the impulse."""
    steps = _timesteps(scheduler)
    options: dict[str, Any] = {"return_dict": False}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(0)
    # Four axes, as images have.
    sample = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for step, timestep in enumerate(steps):
        prediction = _answer(scheduler, float(timestep)) * scheduler.scale_model_input(sample, timestep)
        if step == moved_step:
            prediction = prediction + _IMPULSE
        sample = scheduler.step(prediction, timestep, sample, **options)[0]
    return float(sample)


def _timesteps(scheduler: Any) -> Tensor:
    """Set the scheduler to its first step again; return its timesteps."""
    scheduler.set_timesteps(scheduler.num_inference_steps)
    timesteps: Tensor = scheduler.timesteps
    return timesteps


def _answer(scheduler: Any, timestep: float) -> float:
    """The factor of x in the best prediction for Gaussian data of variance 1."""
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction == "v_prediction":
        # α·noise − σ·sample, of which the best guesses are σ·x and α·x.
        return 0.0
    if prediction == "flow_prediction":
        # noise − sample where x = σ·noise + (1 − σ)·sample.
        sigma = timestep / float(scheduler.config.num_train_timesteps)
        return (2 * sigma - 1) / (sigma**2 + (1 - sigma) ** 2)
    return float((1 - scheduler.alphas_cumprod[round(timestep)]).sqrt())
