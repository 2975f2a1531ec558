"""The family's adapter: inputs, micro-conditions, outputs, blocks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from exporter.errors import InputError
from exporter.models.inputs import TransformerInputs
from exporter.models.pixart import PixArtAdapter

ModelMaker = Callable[[str], nn.Module]

ADAPTER = PixArtAdapter()
PLAIN_NAMES = ["hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask"]


@pytest.mark.parametrize(
    ("name", "micro"), [("small", False), ("unprojected", False), ("micro", True), ("micro_by_size", True)]
)
def test_input_names_follow_the_micro_conditioning(make_model: ModelMaker, name: str, micro: bool) -> None:
    model = make_model(name)
    names = PLAIN_NAMES + (["resolution", "aspect_ratio"] if micro else [])
    assert ADAPTER.input_names(model) == names
    assert set(ADAPTER.example_inputs(model, batch=2, tokens=3).as_dict()) == set(names)


@pytest.mark.parametrize(("name", "width"), [("small", 8), ("unprojected", 20), ("micro", 12)])
def test_the_caption_width(make_model: ModelMaker, name: str, width: int) -> None:
    assert [condition.shape for condition in ADAPTER.conditions(make_model(name))] == [(None, width), (None,)]


@pytest.mark.parametrize(
    ("name", "raw_channels", "channels"),
    [("small", 1, 1), ("unprojected", 2, 1), ("micro", 8, 4), ("micro_by_size", 4, 4)],
)
def test_the_noise_prediction_drops_the_variance(
    make_model: ModelMaker, name: str, raw_channels: int, channels: int
) -> None:
    model = make_model(name)
    inputs = ADAPTER.example_inputs(model, batch=2, tokens=3)
    with torch.no_grad():
        raw, noise = ADAPTER.forward(model, inputs), ADAPTER.predict_noise(model, inputs)
    assert raw.shape[1] == raw_channels
    assert noise.shape == inputs.hidden_states.shape
    assert noise.shape[1] == channels
    assert torch.equal(noise, raw[:, :channels])
    np.testing.assert_array_equal(ADAPTER.noise_prediction(raw.numpy(), model), noise.numpy())


def test_micro_conditions_are_pixels_of_the_latent_and_can_be_given(make_model: ModelMaker) -> None:
    model = make_model("micro")
    captions = {"encoder_hidden_states": torch.zeros(2, 3, 12), "encoder_attention_mask": torch.ones(2, 3)}
    filled = ADAPTER.with_conditions(model, TransformerInputs(torch.zeros(2, 4, 6, 12), torch.zeros(2), captions))
    assert filled.conditions["resolution"].tolist() == [[48.0, 96.0]] * 2
    assert filled.conditions["aspect_ratio"].tolist() == [[0.5]] * 2
    assert ADAPTER.with_conditions(model, filled) is filled
    assert ADAPTER.with_conditions(make_model("small"), filled).conditions.keys() == captions.keys()


def test_the_forward_module_takes_its_inputs_in_the_order_of_their_names(make_model: ModelMaker) -> None:
    model = make_model("micro")
    inputs = ADAPTER.example_inputs(model, batch=2, tokens=3)
    arguments = [inputs.as_dict()[name] for name in ADAPTER.input_names(model)]
    with torch.no_grad():
        assert torch.equal(ADAPTER.forward_module(model, inputs)(*arguments), ADAPTER.forward(model, inputs))


def test_blocks_carry_their_module_paths(make_model: ModelMaker) -> None:
    model = make_model("small")
    blocks = ADAPTER.blocks(model)
    assert [name for name, _ in blocks] == ["transformer_blocks.0", "transformer_blocks.1"]
    assert all(model.get_submodule(name) is block for name, block in blocks)


def test_the_latent_follows_the_config_or_the_recipe(make_model: ModelMaker) -> None:
    model = make_model("small")
    assert ADAPTER.latent_shape(model) == (1, 8, 8)
    assert ADAPTER.latent_shape(model, 12) == (1, 12, 12)
    with pytest.raises(InputError, match="resolution: 13 is not a multiple of the model's patch_size 2; nearest: 12"):
        ADAPTER.latent_shape(model, 13)


def test_another_resolution_runs(make_model: ModelMaker) -> None:
    model = make_model("small")
    inputs = ADAPTER.example_inputs(model, batch=2, tokens=3, resolution=12)
    with torch.no_grad():
        assert ADAPTER.predict_noise(model, inputs).shape == (2, 1, 12, 12)


def test_inputs_slice_index_and_join(make_model: ModelMaker) -> None:
    inputs = ADAPTER.example_inputs(make_model("micro"), batch=4, tokens=3)
    first, rest = inputs[:1], inputs[torch.tensor([1, 2, 3])]
    assert (first.batch, rest.batch) == (1, 3)
    joined = TransformerInputs.concatenate([first, rest])
    assert all(torch.equal(joined.as_dict()[name], tensor) for name, tensor in inputs.as_dict().items())
    assert {name: array.dtype for name, array in inputs.as_numpy().items()} == dict.fromkeys(
        inputs.as_dict(), np.dtype(np.float32)
    )
