"""What captured inputs count: as far as an error in their predictions moves the finished sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from exporter.calibration.activations import BatchLimit
from exporter.calibration.block_inputs import BlockInputs
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.inputs import CalibrationRun
from exporter.calibration.step_weights import step_responses, trajectory_weights
from exporter.models.inputs import TransformerInputs
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.recipe import SCHEDULERS
from exporter.sampling import DenoiserCall, make_scheduler, sample

STEPS = 5


def test_ddim_has_its_closed_form() -> None:
    scheduler = make_scheduler("DDIMScheduler", None, STEPS)
    signal = torch.tensor([float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps], dtype=torch.float64)
    signal = torch.cat([signal, torch.tensor([float(scheduler.final_alpha_cumprod)])])
    angle = torch.arccos(signal.sqrt())
    turned = angle[:-1] - angle[1:]
    later = torch.tensor([float(turned[step + 1 :].cos().prod()) for step in range(STEPS)])
    torch.testing.assert_close(
        step_responses(scheduler), -turned.sin() / angle[:-1].cos() * later, rtol=2e-5, atol=0.0, check_dtype=False
    )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_sampler_moves_as_predicted(name: str) -> None:
    """Of unit Gaussian data, for which σ·x is the best guess, through the sampler with guidance as it is run."""
    scheduler, guidance, shape = make_scheduler(name, None, STEPS), 3.0, (1, 2, 2)
    sides = Prompts({"p": torch.zeros(1, 1)}, {"p": torch.zeros(1, 1)})
    calls: list[DenoiserCall] = []

    def finished(moved: tuple[int, int] | None) -> Tensor:
        calls.clear()

        def denoise(inputs: TransformerInputs) -> Tensor:
            sigma = (1 - scheduler.alphas_cumprod[round(float(inputs.timestep[0]))]).sqrt()
            noise = sigma * inputs.hidden_states
            if moved is not None and calls[-1].step == moved[0]:
                noise[moved[1]] += 0.25
            return noise

        return sample(
            denoise,
            sides,
            torch.zeros(1, dtype=torch.int64),
            scheduler,
            steps=STEPS,
            guidance=guidance,
            seed=4,
            latent_shape=shape,
            record=calls.append,
        )

    at_rest = finished(None)
    steps = torch.arange(STEPS).repeat_interleave(2)
    prompt = torch.tensor([-1, 0]).repeat(STEPS)
    captured = CalibrationSet(torch.zeros(2 * STEPS, *shape), torch.zeros(2 * STEPS), prompt, steps)
    moved = [finished((step, side)) - at_rest for step in range(STEPS) for side in range(2)]
    squares = torch.stack([difference.square().mean() for difference in moved])
    weights = trajectory_weights(captured, scheduler, guidance)
    assert float(weights.mean()) == pytest.approx(1)
    torch.testing.assert_close(weights, squares / squares.mean(), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("prediction", ["v_prediction", "flow_prediction"])
def test_other_predictions_answer_too(prediction: str) -> None:
    """With no answer at all the first steps would count a hundred times as much."""
    scheduler = make_scheduler("DPMSolverMultistepScheduler", None, STEPS)
    scheduler.register_to_config(prediction_type=prediction, use_flow_sigmas=prediction == "flow_prediction")
    responses = step_responses(scheduler)
    assert bool(responses.isfinite().all())
    assert 0.01 < float(responses.abs().max()) < 3


def test_without_guidance_all_inputs_of_a_step_count_alike() -> None:
    scheduler = make_scheduler("DDIMScheduler", None, STEPS)
    steps = torch.arange(STEPS)
    captured = CalibrationSet(torch.zeros(STEPS, 1, 2, 2), torch.zeros(STEPS), torch.zeros(STEPS).long(), steps)
    squares = step_responses(scheduler).square()
    torch.testing.assert_close(trajectory_weights(captured, scheduler, 1.0), (squares / squares.mean()).float())


def test_statistics_count_samples_by_their_weights(
    model: nn.Module, adapter: PixArtAdapter, captured: CalibrationSet, prompts: Prompts
) -> None:
    layer = "transformer_blocks.0.ff.net.2"
    weights = torch.rand(len(captured), generator=torch.Generator().manual_seed(2))
    run = CalibrationRun(adapter, captured, prompts, weights=weights)
    x = run.layer_inputs(model, layer)
    seen = run.input_statistics(model, [layer], x.shape[-1])[layer]
    expected = torch.einsum("m,mtk,mtl->kl", weights, x, x)
    torch.testing.assert_close(seen.gram, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(seen.mean_square, expected.diagonal() / x[..., 0].numel())
    assert seen.amax == float(x.abs().max())


def test_samples_of_no_weight_teach_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    x, targets = torch.randn(6, 3, 4, generator=generator), torch.randn(6, 3, 4, generator=generator)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5, 1.5])
    inputs = BlockInputs(x, {}, {}, weights=weights)
    block, indices = nn.Linear(4, 4), torch.tensor([1, 2, 4])
    errors = (block(x) - targets).square().mean(dim=(1, 2))
    found = inputs.mean_squared_error(block, targets, indices)
    torch.testing.assert_close(found, (errors * weights)[indices].mean())
    others = targets + (weights == 0)[:, None, None] * 100
    gradients = []
    for wanted in (targets, others):
        block.zero_grad()
        inputs.mean_squared_error(block, wanted, indices).backward()
        gradients.append(block.weight.grad.clone())
    assert torch.equal(*gradients)
    power = float((targets.square().sum(dim=(1, 2)) * weights).sum())
    assert inputs.square_sum(targets, BatchLimit()) == pytest.approx(power)
