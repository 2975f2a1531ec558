"""The original on held-out inputs: its noise predictions are made once, and its samples follow from them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from exporter.calibration.capture import CalibrationSet
from exporter.models.inputs import TransformerInputs
from exporter.sampling import Denoiser, DenoiserCall


@dataclass
class Recorded:
    """A denoiser that keeps what it predicts: `predictions` [M, C, H, W] of all inputs so far, in their order."""

    denoiser: Denoiser
    parts: list[Tensor] = field(default_factory=list)

    def __call__(self, inputs: TransformerInputs) -> Tensor:
        """The denoiser's own prediction."""
        self.parts.append(self.denoiser(inputs))
        return self.parts[-1]

    @property
    def predictions(self) -> Tensor:
        """All of them."""
        return torch.cat(self.parts)


class Replay:
    """Answers the sampler's calls by `predictions` [M, C, H, W] on the inputs that `held_out` captured of the same
    trajectories: positions in the list of prompts, seeds and scheduler are the same. `sample` tells it each call by
    `note`."""

    def __init__(self, held_out: CalibrationSet, predictions: Tensor) -> None:
        self._predictions = predictions
        conditional = held_out.prompt_index >= 0
        # A step's inputs with a prompt, or without, are in the trajectories' order.
        self._rows = {
            (step, with_prompt): torch.nonzero((held_out.step_index == step) & (conditional == with_prompt)).flatten()
            for step in set(held_out.step_index.tolist())
            for with_prompt in (False, True)
        }
        self._call: DenoiserCall | None = None

    def note(self, call: DenoiserCall) -> None:
        """Remember which call comes next."""
        self._call = call

    def __call__(self, _inputs: TransformerInputs) -> Tensor:
        """The predictions on the inputs of the call."""
        if self._call is None:
            raise RuntimeError("the sampler must note its call first")
        step = self._call.step
        places = zip(self._call.samples.tolist(), (self._call.prompts >= 0).tolist(), strict=True)
        return self._predictions[torch.stack([self._rows[step, with_prompt][sample] for sample, with_prompt in places])]
