"""Captured inputs: every step, conditional and not, what the sampler really fed; and their file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exporter.calibration.capture import CalibrationSet, capture_trajectories
from exporter.errors import InputError
from exporter.models.inputs import TransformerInputs
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.progress import NullProgress
from exporter.recipe import CalibrationSection
from exporter.sampling import make_scheduler, sample

SHAPE = (2, 8, 8)


def test_every_step_is_covered_conditionally_and_unconditionally(captured: CalibrationSet, prompts: Prompts) -> None:
    assert len(captured) == 3 * 4 * 2
    for step in range(3):
        here = captured.step_index == step
        assert sorted(captured.prompt_index[here].tolist()) == [-1, -1, -1, -1, 0, 0, 1, 2]
        assert len(captured.timesteps[here].unique()) == 1
    assert captured.timesteps.unique().tolist() == sorted(captured.timesteps.unique().tolist())
    assert captured.timesteps.max() > 900


def test_the_inputs_are_those_that_the_denoiser_saw(
    model: nn.Module, adapter: PixArtAdapter, prompts: Prompts, settings: CalibrationSection, captured: CalibrationSet
) -> None:
    seen: list[TransformerInputs] = []

    def denoiser(inputs: TransformerInputs) -> Tensor:
        seen.append(inputs)
        return adapter.predict_noise(model, inputs)

    sample(
        denoiser,
        prompts,
        torch.tensor([0, 1, 2, 0]),
        make_scheduler(settings.scheduler, None, settings.steps),
        steps=settings.steps,
        guidance=settings.guidance,
        seed=3,
        latent_shape=SHAPE,
    )
    expected = TransformerInputs.concatenate(seen)
    found = captured.inputs(torch.arange(len(captured)), prompts)
    for name, tensor in expected.as_dict().items():
        assert torch.equal(found.as_dict()[name], tensor), name


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_set_does_not_depend_on_how_many_trajectories_are_sampled_at_once(
    model: nn.Module,
    adapter: PixArtAdapter,
    prompts: Prompts,
    settings: CalibrationSection,
    monkeypatch: pytest.MonkeyPatch,
    guidance: float,
) -> None:
    sets = []
    for at_once in (64, 2):
        # A batch of 2 trajectories of 16 tokens.
        monkeypatch.setattr("exporter.sampling._MOST_TOKENS", at_once * 16 * (1 if guidance == 1.0 else 2))
        sets.append(
            capture_trajectories(
                model,
                adapter,
                prompts,
                settings.model_copy(update={"guidance": guidance}),
                NullProgress(),
                trajectories=5,
                seed=3,
                latent_shape=SHAPE,
                scheduler_config=None,
            )
        )
    together, apart = sets
    assert torch.equal(together.prompt_index, apart.prompt_index)
    assert torch.equal(together.step_index, apart.step_index)
    assert torch.equal(together.timesteps, apart.timesteps)
    torch.testing.assert_close(together.hidden_states, apart.hidden_states, atol=1e-4, rtol=1e-4)


def test_without_guidance_only_conditional_inputs_are_captured(
    model: nn.Module, adapter: PixArtAdapter, prompts: Prompts, settings: CalibrationSection
) -> None:
    captured = capture_trajectories(
        model,
        adapter,
        prompts,
        settings.model_copy(update={"guidance": 1.0}),
        NullProgress(),
        trajectories=2,
        seed=0,
        latent_shape=SHAPE,
        scheduler_config=None,
    )
    assert len(captured) == 3 * 2
    assert bool((captured.prompt_index >= 0).all())


def test_a_diverging_sampler_is_reported_with_its_step(
    model: nn.Module, adapter: PixArtAdapter, prompts: Prompts, settings: CalibrationSection
) -> None:
    with pytest.raises(InputError, match=r"NaN or infinite latents from step 1 on: .*guidance"):
        capture_trajectories(
            model,
            adapter,
            prompts,
            settings.model_copy(update={"guidance": 1e39}),
            NullProgress(),
            trajectories=1,
            seed=0,
            latent_shape=SHAPE,
            scheduler_config=None,
        )


def test_a_saved_set_comes_back_and_has_the_same_bytes_each_time(captured: CalibrationSet, tmp_path: Path) -> None:
    captured.save(tmp_path / "a.safetensors")
    captured.save(tmp_path / "b.safetensors")
    loaded = CalibrationSet.load(tmp_path / "a.safetensors")
    for name in ("hidden_states", "timesteps", "prompt_index", "step_index"):
        assert torch.equal(getattr(loaded, name), getattr(captured, name))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def _broken(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    changes: dict[str, dict[str, Tensor]] = {
        "missing": {},
        "unexpected": {**tensors, "extra": torch.zeros(1)},
        "short": {**tensors, "timesteps": tensors["timesteps"][1:].clone()},
        "type": {**tensors, "step_index": tensors["step_index"].float()},
        "rank": {**tensors, "hidden_states": tensors["hidden_states"].flatten(1)},
        "nan": {**tensors, "hidden_states": tensors["hidden_states"] * float("nan")},
        "empty": {key: tensor[:0].clone() for key, tensor in tensors.items()},
    }
    return changes[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "not a calibration set: it holds nothing"),
        ("unexpected", "not a calibration set: it holds extra"),
        ("short", "timesteps: 23 inputs, but hidden_states has 24"),
        ("type", "step_index: torch.float32"),
        ("rank", "hidden_states: torch.float32"),
        ("nan", "hidden_states: NaN or infinite"),
        ("empty", "0 inputs"),
    ],
)
def test_a_file_that_is_not_such_a_set_is_refused(
    captured: CalibrationSet, tmp_path: Path, name: str, message: str
) -> None:
    path = tmp_path / "set.safetensors"
    captured.save(path)
    save_file(_broken(name, load_file(path)), path)
    with pytest.raises(InputError, match=message):
        CalibrationSet.load(path)


def test_a_truncated_or_missing_file_is_refused(captured: CalibrationSet, tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    captured.save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="cannot be read as a calibration set"):
        CalibrationSet.load(path)
    with pytest.raises(InputError, match="cannot be read as a calibration set"):
        CalibrationSet.load(tmp_path / "absent.safetensors")


def test_one_negative_prompt_each_goes_with_its_own_prompt(captured: CalibrationSet, prompts: Prompts) -> None:
    own = replace(prompts, negative={name: tensor + 100 for name, tensor in prompts.positive.items()})
    some = CalibrationSet(
        captured.hidden_states[:4],
        captured.timesteps[:4],
        torch.tensor([2, -1, -3, 0]),
        captured.step_index[:4],
    )
    inputs = some.inputs(torch.arange(4), own)
    positive, negative = own.positive["encoder_hidden_states"], own.negative["encoder_hidden_states"]
    expected = torch.stack([positive[2], negative[0], negative[2], positive[0]])
    assert torch.equal(inputs.conditions["encoder_hidden_states"], expected)
