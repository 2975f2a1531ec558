"""What calibration sees: the denoiser's inputs on real sampler trajectories."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from exporter.calibration.activations import BatchLimit
from exporter.calibration.placement import Placement
from exporter.errors import InputError
from exporter.models.adapter import Adapter
from exporter.models.inputs import TransformerInputs
from exporter.models.prompts import Prompts
from exporter.progress import Progress
from exporter.recipe import CalibrationSection
from exporter.sampling import DenoiserCall, make_scheduler, sample, samples_at_once, transformer_inputs
from exporter.tensor_files import atomic_tensor_path

_DTYPES = {
    "hidden_states": torch.float32,
    "timesteps": torch.float32,
    "prompt_index": torch.int64,
    "step_index": torch.int64,
}


@dataclass(frozen=True)
class CalibrationSet:
    """M inputs of the denoiser, as the sampler gave them.

    hidden_states float32 [M, C, H, W] (scaled by the scheduler), timesteps float32 [M], prompt_index int64 [M]
    (-1 - row for row `row` of the negative prompts: -1 where there is only one), step_index int64 [M].
    """

    hidden_states: Tensor
    timesteps: Tensor
    prompt_index: Tensor
    step_index: Tensor

    def __len__(self) -> int:
        return len(self.hidden_states)

    def inputs(self, indices: Tensor, prompts: Prompts) -> TransformerInputs:
        """Return the inputs at `indices` int64 [B], with their prompts."""
        return transformer_inputs(
            self.hidden_states[indices], self.timesteps[indices], self.prompt_index[indices], prompts
        )

    def at(self, indices: Tensor) -> CalibrationSet:
        """The set of the inputs at `indices` int64 [B]."""
        return CalibrationSet(**{field.name: getattr(self, field.name)[indices] for field in fields(self)})

    def save(self, path: Path) -> None:
        """Write the set as safetensors; the same set gives the same bytes."""
        with atomic_tensor_path(path) as temporary:
            save_file({field.name: getattr(self, field.name).contiguous() for field in fields(self)}, temporary)

    @classmethod
    def load(cls, path: Path) -> CalibrationSet:
        """Read a set back. Raises `InputError` for a file that is damaged or is something else."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read as a calibration set: {error}") from error
        if tensors.keys() != _DTYPES.keys():
            raise InputError(f"{path}: not a calibration set: it holds {', '.join(sorted(tensors)) or 'nothing'}")
        count = len(tensors["hidden_states"])
        for name, tensor in tensors.items():
            if tensor.dtype != _DTYPES[name] or tensor.ndim != (4 if name == "hidden_states" else 1):
                raise InputError(f"{path}: {name}: {tensor.dtype} {list(tensor.shape)} is not a calibration set's")
            if len(tensor) != count or count == 0:
                raise InputError(f"{path}: {name}: {len(tensor)} inputs, but hidden_states has {count}")
            if not bool(tensor.isfinite().all()):
                raise InputError(f"{path}: {name}: NaN or infinite")
        return cls(**tensors)


def capture_trajectories(
    model: nn.Module,
    adapter: Adapter,
    prompts: Prompts,
    settings: CalibrationSection,
    progress: Progress,
    *,
    trajectories: int,
    seed: int,
    latent_shape: tuple[int, int, int],
    scheduler_config: Path | None,
    placement: Placement | None = None,
) -> CalibrationSet:
    """Sample `trajectories` latents with `model` and keep the calls' inputs, conditional and not, of every step that
    `settings` keep.

    Prompts are used in turn; `scheduler_config` is the checkpoint's, see `make_scheduler`. The inputs are in the order
    of steps, in each the unconditional ones first, then of trajectories, however many are sampled at once: fewer where
    they do not fit the memory. `placement` says what computes, without one the CPU. Raises `InputError` when a latent
    that is kept is no longer finite.
    """
    placement, calls = placement or Placement(), _Calls(trajectories, settings.kept_steps)

    def sampled(at_once: int) -> None:
        calls.clear()
        sample(
            partial(adapter.predict_noise, model),
            prompts.to(placement.device),
            torch.arange(trajectories) % prompts.count,
            make_scheduler(settings.scheduler, scheduler_config, settings.steps, adapter.training_noise),
            steps=settings.steps,
            guidance=settings.guidance,
            seed=seed,
            latent_shape=latent_shape,
            progress=progress,
            batch_size=at_once,
            record=calls.keep,
            finish=False,
        )

    tokens, limit = adapter.tokens(model, latent_shape), BatchLimit.unlimited()
    at_once = samples_at_once(tokens, settings.guidance)
    with placement.holds_model(model, adapter.blocks(model)):
        while not limit.fits(at_once, tokens, partial(sampled, at_once)):
            at_once = limit.samples(at_once, tokens)
    captured = calls.in_order()
    _refuse_lost_latents(captured)
    return captured


@dataclass(frozen=True)
class _Calls:
    """The denoiser's calls along `trajectories` at the `kept` steps, as they come: their inputs, and each input's place
    in the order."""

    trajectories: int
    kept: range
    parts: list[CalibrationSet] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)

    def clear(self) -> None:
        """Forget all calls: those of samples that did not fit the memory are made again."""
        self.parts.clear()
        self.places.clear()

    def keep(self, call: DenoiserCall) -> None:
        """Add one, if its step is kept."""
        if call.step not in self.kept:
            return
        steps = torch.full_like(call.prompts, call.step)
        latents, timesteps = call.inputs.hidden_states.cpu(), call.inputs.timestep.cpu()
        self.parts.append(CalibrationSet(latents, timesteps, call.prompts, steps))
        self.places.append((2 * steps + (call.prompts >= 0)) * self.trajectories + call.samples)

    def in_order(self) -> CalibrationSet:
        """All inputs as one set: by step, in each the unconditional ones first, then by trajectory."""
        order = torch.cat(self.places).argsort()
        names = [one.name for one in fields(CalibrationSet)]
        whole = {name: torch.cat([getattr(part, name) for part in self.parts]) for name in names}
        return CalibrationSet(**whole).at(order)


def _refuse_lost_latents(captured: CalibrationSet) -> None:
    finite = captured.hidden_states.flatten(1).isfinite().all(dim=1)
    if not bool(finite.all()):
        step = int(captured.step_index[~finite].min())
        raise InputError(
            f"sampling with the original model gives NaN or infinite latents from step {step} on: "
            "check the weights, calibration.scheduler and calibration.guidance"
        )
