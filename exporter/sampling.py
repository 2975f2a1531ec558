"""Run a diffusion sampler over a denoiser: for calibration trajectories, for evaluation and for sample grids."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from exporter.errors import InputError, did_you_mean
from exporter.models.adapter import LINEAR_NOISE
from exporter.models.inputs import TransformerInputs
from exporter.models.prompts import Prompts
from exporter.progress import NullProgress, Progress
from exporter.recipe import SCHEDULERS

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

Denoiser = Callable[[TransformerInputs], Tensor]
"""Transformer inputs of batch B → the noise prediction [B, C, H, W]."""


_PREDICTIONS = ("epsilon", "v_prediction", "flow_prediction")
# Of one call: matrix products are at full speed by then, and a model of 1.5 B parameters needs some 3 GB for them.
_MOST_TOKENS = 16_384
MOST_SAMPLES = 64


@dataclass(frozen=True)
class DenoiserCall:
    """One call of the denoiser while sampling.

    `samples` int64 [B] are positions in the list of prompts being sampled; `prompts` int64 [B] their prompt indices,
    or -1 - row for row `row` of the negative prompts, so -1 wherever one negative prompt serves all.
    """

    step: int
    samples: Tensor
    prompts: Tensor
    inputs: TransformerInputs


def make_scheduler(
    name: str, config_file: Path | None, steps: int, training_noise: Mapping[str, Any] | None = LINEAR_NOISE
) -> SchedulerMixin:
    """Make diffusers' scheduler `name`, set to `steps`, with the noise schedule of the checkpoint's `config_file`.

    Without a file the schedule is `training_noise`, the family's. Raises `InputError` for an unknown name, a missing or
    broken file, or steps that the schedule does not have.
    """
    import diffusers

    if name not in SCHEDULERS:
        raise InputError(f"unknown scheduler {name!r}{did_you_mean(name, SCHEDULERS)}")
    # Latents leave [-1, 1], to which DDIM and DDPM clip unless a config says otherwise.
    config = {"clip_sample": False, **_noise_schedule(config_file, training_noise)}
    scheduler_class = getattr(diffusers, name)
    known = inspect.signature(scheduler_class.__init__).parameters
    try:
        scheduler: Any = scheduler_class.from_config({key: value for key, value in config.items() if key in known})
        if steps > scheduler.config.num_train_timesteps:
            raise InputError(
                f"calibration.steps: {steps} is more than the {scheduler.config.num_train_timesteps} steps that the "
                f"model was trained with"
            )
        scheduler.set_timesteps(steps)
    except (TypeError, ValueError, IndexError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{config_file}: does not configure a {name} of {steps} steps: {reason}") from error
    return cast("SchedulerMixin", scheduler)


def _noise_schedule(config_file: Path | None, training_noise: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if config_file is not None:
        return _read_config(config_file)
    if training_noise is None:
        raise InputError(
            "model.weights: scheduler/scheduler_config.json is missing, and this family's versions differ in their "
            "noise schedules; give the whole pipeline's folder"
        )
    return training_noise


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: a scheduler's config is a JSON object")
    if config.get("prediction_type", "epsilon") not in _PREDICTIONS:
        raise InputError(
            f"{path}: prediction_type {config['prediction_type']!r}: only models that predict the noise ('epsilon') or "
            "a velocity ('v_prediction', 'flow_prediction')"
        )
    return config


def samples_at_once(tokens: int, guidance: float) -> int:
    """How many samples of `tokens` tokens each to denoise in one batch, so that memory stays bounded."""
    rows = 1 if guidance == 1.0 else 2
    return max(1, min(MOST_SAMPLES, _MOST_TOKENS // (rows * tokens)))


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    prompts: Prompts,
    indices: Tensor,
    scheduler: SchedulerMixin,
    *,
    steps: int,
    guidance: float,
    seed: int,
    latent_shape: tuple[int, int, int],
    progress: Progress | None = None,
    batch_size: int = MOST_SAMPLES,
    record: Callable[[DenoiserCall], None] | None = None,
    finish: bool = True,
) -> Tensor:
    """Sample one latent per entry of `indices` (prompt indices int64 [n]): float32 [n, C, H, W].

    Classifier-free guidance: eps = eps_u + guidance·(eps_c − eps_u), both from one call of twice the batch, negative
    prompts first; none at guidance 1. Sample i starts from, and draws all its noise from, a generator seeded with
    `seed` + i, so results do not depend on `batch_size`. `record` sees every call of the denoiser. Without `finish`,
    the last call is recorded but not made, and the latents are those that it would be made with.
    """
    count = len(indices)
    chunks = [torch.arange(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    latents = []
    with (progress or NullProgress()).task("sample", len(chunks) * steps) as task:
        for samples in chunks:
            run = _Trajectories(denoiser, prompts, indices, samples, guidance, record, finish)
            latents.append(run.denoise(scheduler, steps, seed, latent_shape, lambda: task.advance()))
    return torch.cat(latents)


@dataclass(frozen=True)
class _Trajectories:
    """A batch of samples on their way from noise to latents."""

    denoiser: Denoiser
    prompts: Prompts
    indices: Tensor
    samples: Tensor
    guidance: float
    record: Callable[[DenoiserCall], None] | None
    finish: bool

    def denoise(
        self, scheduler: Any, steps: int, seed: int, shape: tuple[int, int, int], advance: Callable[[], None]
    ) -> Tensor:
        """Return the latents [b, C, H, W] of this batch after all steps."""
        generators = [torch.Generator().manual_seed(seed + int(sample)) for sample in self.samples]
        device = self.prompts.device
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        scheduler.set_timesteps(steps, device=device)
        latents: Tensor = noise.to(device) * scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": generators} if takes_generator else {}
        for step, timestep in enumerate(scheduler.timesteps):
            inputs = self._inputs(step, scheduler.scale_model_input(latents, timestep), float(timestep))
            if self.finish or step < len(scheduler.timesteps) - 1:
                eps = self._guided(inputs)
                latents = scheduler.step(eps, timestep, latents, return_dict=False, **options)[0]
            advance()
        return latents

    def _inputs(self, step: int, latents: Tensor, timestep: float) -> TransformerInputs:
        """One call's inputs, which are recorded: with guidance the latents twice, first without prompts."""
        samples, wanted = self.samples, self.indices[self.samples]
        if self.guidance != 1.0:
            negative = torch.full_like(wanted, -1) if self.prompts.negatives == 1 else -1 - wanted
            samples, wanted = samples.repeat(2), torch.cat([negative, wanted])
            latents = torch.cat([latents, latents])
        inputs = transformer_inputs(latents, torch.full((len(latents),), timestep), wanted, self.prompts)
        if self.record is not None:
            self.record(DenoiserCall(step, samples, wanted, inputs))
        return inputs

    def _guided(self, inputs: TransformerInputs) -> Tensor:
        eps = self.denoiser(inputs)
        if self.guidance == 1.0:
            return eps
        unconditional, conditional = eps.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)


def transformer_inputs(
    latents: Tensor, timesteps: Tensor, prompt_indices: Tensor, prompts: Prompts
) -> TransformerInputs:
    """Gather one call's inputs: latents [B, C, H, W], timesteps [B], prompt indices int64 [B] as `DenoiserCall` has."""
    return TransformerInputs(latents, timesteps.to(latents), prompts.gather(prompt_indices))
