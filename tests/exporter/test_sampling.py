"""The sampler: guidance, seeds that do not depend on the batch, schedulers and their configs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exporter.errors import InputError
from exporter.models.inputs import TransformerInputs
from exporter.models.prompts import Prompts
from exporter.recipe import SCHEDULERS
from exporter.sampling import DenoiserCall, make_scheduler, sample, samples_at_once

SHAPE = (1, 4, 4)


@pytest.fixture
def prompts() -> Prompts:
    """Prompt p says p + 1 everywhere, the negative prompt 0."""
    says = torch.arange(1.0, 5.0)[:, None, None].expand(4, 3, 2).clone()
    return Prompts({"encoder_hidden_states": says}, {"encoder_hidden_states": torch.zeros(1, 3, 2)})


def denoiser(inputs: TransformerInputs) -> Tensor:
    """The exact noise of data that is the prompt's constant everywhere, under PixArt's schedule."""
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[inputs.timestep.long()][:, None, None, None]
    data = inputs.conditions["encoder_hidden_states"][:, 0, 0][:, None, None, None]
    return (inputs.hidden_states - alphas.sqrt() * data) / (1 - alphas).sqrt()


def _sample(
    prompts: Prompts, indices: list[int], scheduler: str = "DPMSolverMultistepScheduler", **options: object
) -> Tensor:
    settings: dict[str, object] = {"steps": 10, "guidance": 1.0, "seed": 0, "latent_shape": SHAPE, **options}
    return sample(
        denoiser, prompts, torch.tensor(indices), make_scheduler(scheduler, None, int(settings["steps"])), **settings
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_each_scheduler_leads_to_the_data_that_the_denoiser_knows(prompts: Prompts, scheduler: str) -> None:
    result = _sample(prompts, [0, 2, 3], scheduler, steps=20)
    expected = torch.tensor([1.0, 3.0, 4.0])[:, None, None, None].expand_as(result)
    torch.testing.assert_close(result, expected, atol=0.2, rtol=0.05)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_samples_do_not_depend_on_the_batch(prompts: Prompts, scheduler: str) -> None:
    together = _sample(prompts, [0, 1, 2, 3, 0], scheduler, guidance=2.0)
    apart = _sample(prompts, [0, 1, 2, 3, 0], scheduler, guidance=2.0, batch_size=2)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    assert bool(together.isfinite().all())


def test_long_samples_are_denoised_few_at_once() -> None:
    assert samples_at_once(tokens=64, guidance=4.5) == 64
    assert samples_at_once(tokens=1024, guidance=1.0) == 2 * samples_at_once(tokens=1024, guidance=4.5)
    assert samples_at_once(tokens=4096, guidance=4.5) == 2
    assert samples_at_once(tokens=1 << 20, guidance=4.5) == 1


def test_the_seed_decides_the_samples(prompts: Prompts) -> None:
    calls: list[DenoiserCall] = []
    first = _sample(prompts, [0, 0], record=calls.append)
    assert torch.equal(first, _sample(prompts, [0, 0]))
    start = calls[0].inputs.hidden_states
    assert not torch.equal(start[0], start[1])
    shifted: list[DenoiserCall] = []
    _sample(prompts, [0], seed=1, record=shifted.append)
    assert torch.equal(shifted[0].inputs.hidden_states[0], start[1])


def test_guidance_goes_from_the_negative_prompt_through_the_prompt_and_past_it(prompts: Prompts) -> None:
    result = _sample(prompts, [1], guidance=3.0, steps=20)
    torch.testing.assert_close(result, torch.full_like(result, 3.0 * 2.0), atol=0.3, rtol=0.05)


def test_guidance_calls_negative_prompts_first_and_guidance_1_leaves_them_out(prompts: Prompts) -> None:
    calls: list[DenoiserCall] = []
    _sample(prompts, [1, 3], guidance=3.0, record=calls.append)
    assert [call.step for call in calls] == list(range(10))
    assert calls[0].prompts.tolist() == [-1, -1, 1, 3]
    assert calls[0].samples.tolist() == [0, 1, 0, 1]
    assert calls[0].inputs.conditions["encoder_hidden_states"][:, 0, 0].tolist() == [0.0, 0.0, 2.0, 4.0]
    assert torch.equal(calls[0].inputs.hidden_states[:2], calls[0].inputs.hidden_states[2:])
    assert calls[0].inputs.timestep.dtype == torch.float32
    calls.clear()
    _sample(prompts, [1, 3], record=calls.append)
    assert calls[0].prompts.tolist() == [1, 3]


def test_without_a_finish_the_last_call_is_recorded_but_not_made(prompts: Prompts) -> None:
    calls: list[DenoiserCall] = []
    _sample(prompts, [0, 2], guidance=2.0, record=calls.append)
    recorded, made = [], []

    def counting(inputs: TransformerInputs) -> Tensor:
        made.append(inputs)
        return denoiser(inputs)

    sample(
        counting,
        prompts,
        torch.tensor([0, 2]),
        make_scheduler("DPMSolverMultistepScheduler", None, 10),
        steps=10,
        guidance=2.0,
        seed=0,
        latent_shape=SHAPE,
        record=recorded.append,
        finish=False,
    )
    assert len(made) == len(calls) - 1
    assert [call.step for call in recorded] == list(range(10))
    for found, expected in zip(recorded, calls, strict=True):
        assert torch.equal(found.inputs.hidden_states, expected.inputs.hidden_states)


def test_the_checkpoints_noise_schedule_is_used_with_any_scheduler(tmp_path: Path) -> None:
    file = tmp_path / "scheduler_config.json"
    config = {"_class_name": "DPMSolverMultistepScheduler", "beta_end": 0.05, "solver_order": 3, "unheard_of": 1}
    file.write_text(json.dumps(config))
    assert make_scheduler("DDIMScheduler", file, 5).config["beta_end"] == 0.05
    assert make_scheduler("DPMSolverMultistepScheduler", file, 5).config["solver_order"] == 3
    assert make_scheduler("DDIMScheduler", None, 5).config["beta_end"] == 0.02


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "a JSON object"),
        ('{"prediction_type": "sample"}', "only models that predict the noise"),
        ('{"beta_schedule": "parabolic"}', "does not configure a DDIMScheduler"),
        ('{"num_train_timesteps": "many"}', "does not configure a DDIMScheduler"),
        ('{"num_train_timesteps": 4}', "5 is more than the 4 steps"),
        ('{"timestep_spacing": "foo"}', "does not configure a DDIMScheduler"),
    ],
)
def test_broken_scheduler_configs_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "scheduler_config.json"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        make_scheduler("DDIMScheduler", file, 5)
    assert "\n" not in str(caught.value)


def test_unknown_schedulers_are_refused_with_a_suggestion() -> None:
    with pytest.raises(InputError, match="did you mean 'DDIMScheduler'"):
        make_scheduler("DDIMSheduler", None, 5)
