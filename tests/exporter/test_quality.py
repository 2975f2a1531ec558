"""Quality figures on models whose error is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from exporter.calibration.capture import CalibrationSet
from exporter.errors import InputError
from exporter.models.inputs import TransformerInputs
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.plan import LayerPlan, Plan
from exporter.progress import NullProgress
from exporter.quality import class_accuracy, collected_rows, layer_quality, noise_prediction_snr
from exporter.quantize import quantize_model, round_to_nearest
from plugins.formats import get_format


@pytest.fixture
def held_out() -> CalibrationSet:
    return CalibrationSet(
        hidden_states=torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)),
        timesteps=torch.tensor([900.0] * 4 + [500.0] * 4 + [100.0] * 4),
        prompt_index=torch.tensor([-1, -1, 0, 0] * 3),
        step_index=torch.tensor([0] * 4 + [1] * 4 + [2] * 4),
    )


@pytest.fixture
def prompts() -> Prompts:
    return Prompts({"encoder_hidden_states": torch.ones(1, 2, 3)}, {"encoder_hidden_states": torch.zeros(1, 2, 3)})


def test_snr_per_step_and_side(held_out: CalibrationSet, prompts: Prompts) -> None:
    def original(inputs: TransformerInputs) -> torch.Tensor:
        return inputs.hidden_states

    def quantized(inputs: TransformerInputs) -> torch.Tensor:
        """Off by a tenth at step 0, exact at step 1, off by a hundredth with a prompt at step 2."""
        with_prompt = inputs.conditions["encoder_hidden_states"][:, 0, 0]
        error = 0.1 * (inputs.timestep == 900) + 0.01 * (inputs.timestep == 100) * with_prompt
        return inputs.hidden_states * (1 + error).reshape(-1, 1, 1, 1)

    noise = noise_prediction_snr(original, quantized, held_out, prompts, NullProgress(), batch_size=5)
    first, second, third = noise.steps
    assert (first.step, first.timestep, first.snr_db) == (0, 900.0, pytest.approx(20, abs=1e-3))
    assert second.snr_db == 200
    assert third.conditional_db == pytest.approx(40, abs=1e-2)
    assert third.unconditional_db == 200
    assert 40 < third.snr_db < 46
    assert noise.worst_db == first.snr_db
    assert noise.mean_db == pytest.approx((first.snr_db + 200 + third.snr_db) / 3)


def test_snr_without_guidance_has_one_side(held_out: CalibrationSet, prompts: Prompts) -> None:
    rows = held_out.prompt_index >= 0
    fields = ("hidden_states", "timesteps", "prompt_index", "step_index")
    conditional = CalibrationSet(*(getattr(held_out, name)[rows] for name in fields))

    def denoiser(inputs: TransformerInputs) -> torch.Tensor:
        return inputs.hidden_states

    noise = noise_prediction_snr(denoiser, denoiser, conditional, prompts, NullProgress())
    assert all(math.isnan(step.unconditional_db) for step in noise.steps)
    assert all(step.conditional_db == step.snr_db for step in noise.steps)


def test_a_model_that_gives_nan_has_the_worst_snr(held_out: CalibrationSet, prompts: Prompts) -> None:
    def broken(inputs: TransformerInputs) -> torch.Tensor:
        return inputs.hidden_states * torch.nan

    noise = noise_prediction_snr(lambda inputs: inputs.hidden_states, broken, held_out, prompts, NullProgress())
    assert noise.worst_db == -200


def test_layers_are_measured_on_the_original_models_inputs() -> None:
    torch.manual_seed(0)
    model: nn.Module = PixArtTransformer2DModel(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=8,
        in_channels=1,
        out_channels=1,
        sample_size=4,
        use_additional_conditions=False,
    ).eval()
    layers, weights = [], {}
    for name, weight_format, activation in (
        ("transformer_blocks.0.attn1.to_q", "int8", "int8"),
        ("transformer_blocks.0.ff.net.2", "e2m1", "none"),
    ):
        weight, fmt = model.get_submodule(name).weight.detach(), get_format(weight_format)
        layers.append(LayerPlan(name, *weight.shape, True, weight_format, activation, 0, "channel", "int8"))
        weights[name] = round_to_nearest(weight, weight.abs().amax(1, True) / fmt.max, fmt)
    plan = Plan(tuple(layers), (), 0, 0)
    adapter = PixArtAdapter()
    with torch.no_grad(), collected_rows(model, plan, batches=2) as rows:
        for tokens in (3, 4):
            adapter.forward(model, adapter.example_inputs(model, batch=2, tokens=tokens))
    # Two batches of two samples of four patches each.
    assert {name: len(found) for name, found in rows.items()} == dict.fromkeys(weights, 16)
    fine, coarse = layer_quality(model, quantize_model(model, plan, weights), plan, rows)
    assert (fine.name, fine.shape, fine.weight_format) == ("transformer_blocks.0.attn1.to_q", (32, 32), "int8")
    assert 40 < fine.weight_sqnr_db < 60
    assert 35 < fine.output_sqnr_db < fine.weight_sqnr_db
    assert 12 < coarse.weight_sqnr_db < 25
    assert coarse.output_sqnr_db == pytest.approx(coarse.weight_sqnr_db, abs=4)


def test_a_wide_layer_is_measured_on_a_sample_of_its_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 1024))
    weight, fmt = model[0].weight.detach(), get_format("e2m1")
    # Every fourth channel is looked at; the others hold what no scale could.
    scales = weight.abs().amax(1, True) / fmt.max
    whole = LayerPlan("0", 1024, 16, True, "e2m1", "e2m3", 0, "channel", "int8")
    wrong = torch.where((torch.arange(1024) % 4 == 0)[:, None], scales, scales * 100)
    plan, rows = Plan((whole,), (), 0, 0), {"0": torch.randn(8, 16)}
    found = [
        layer_quality(model, quantize_model(model, plan, {"0": round_to_nearest(weight, used, fmt)}), plan, rows)
        for used in (scales, wrong)
    ]
    assert found[0] == found[1]
    assert 12 < found[0][0].weight_sqnr_db < 25


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """Three classes: the sum of each row of a 3 x 2 image."""
    nodes = [
        helper.make_node("ReduceSum", ["x", "axes"], ["rows"], keepdims=0),
        helper.make_node("Flatten", ["rows"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 3, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", "classes"])],
        [numpy_helper.from_array(np.array([3]), "axes")],
    )
    path = tmp_path / "classifier.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_class_accuracy_counts_the_largest_logit(classifier: Path) -> None:
    samples = torch.zeros(5, 1, 3, 2)
    for index, row in enumerate([0, 1, 2, 2, 1]):
        samples[index, 0, row] = 1
    labels = torch.tensor([0, 1, 2, 0, 1])
    assert class_accuracy(samples, labels, classifier, batch_size=2) == 0.8


def test_a_classifier_that_does_not_fit_is_refused(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"classifier\.onnx"):
        class_accuracy(torch.zeros(2, 3, 3, 2), torch.tensor([0, 1]), classifier)
    with pytest.raises(InputError, match="labelled up to 7"):
        class_accuracy(torch.zeros(2, 1, 3, 2), torch.tensor([0, 7]), classifier)
    with pytest.raises(InputError, match=r"gone\.onnx"):
        class_accuracy(torch.zeros(2, 1, 3, 2), torch.tensor([0, 1]), tmp_path / "gone.onnx")
