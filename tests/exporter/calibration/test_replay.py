"""What the original predicted on captured inputs gives the samples that it would give itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exporter.calibration.capture import CalibrationSet, capture_trajectories
from exporter.calibration.replay import Recorded, Replay
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.progress import NullProgress
from exporter.recipe import CalibrationSection
from exporter.sampling import make_scheduler, sample

SHAPE = (2, 8, 8)


def sampled(denoiser: Any, prompts: Prompts, settings: CalibrationSection, count: int, **options: Any) -> Tensor:
    return sample(
        denoiser,
        prompts,
        torch.arange(count) % prompts.count,
        make_scheduler(settings.scheduler, None, settings.steps),
        steps=settings.steps,
        guidance=settings.guidance,
        seed=3,
        latent_shape=SHAPE,
        batch_size=2,
        **options,
    )


def replay_of(original: Recorded, captured: CalibrationSet, prompts: Prompts) -> Replay:
    for indices in torch.split(torch.arange(len(captured)), 5):
        original(captured.inputs(indices, prompts))
    return Replay(captured, original.predictions)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_samples_are_the_originals(
    model: nn.Module, adapter: PixArtAdapter, prompts: Prompts, settings: CalibrationSection, guidance: float
) -> None:
    settings = settings.model_copy(update={"guidance": guidance})
    captured = capture_trajectories(
        model,
        adapter,
        prompts,
        settings,
        NullProgress(),
        trajectories=4,
        seed=3,
        latent_shape=SHAPE,
        scheduler_config=None,
    )
    denoiser = partial(adapter.predict_noise, model)
    original = Recorded(denoiser)
    replay = replay_of(original, captured, prompts)
    calls = len(original.parts)
    found = sampled(replay, prompts, settings, 3, record=replay.note)
    assert len(original.parts) == calls
    expected = sampled(denoiser, prompts, settings, 3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    # A trajectory's own predictions: another's would be far away.
    assert (expected[0] - expected[1]).abs().max() > 0.1


def test_a_call_that_was_not_noted_is_an_error(captured: CalibrationSet, prompts: Prompts) -> None:
    replay = Replay(captured, captured.hidden_states)
    with pytest.raises(RuntimeError, match="note its call"):
        replay(captured.inputs(torch.arange(2), prompts))
