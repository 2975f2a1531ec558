"""What the exporter needs to know about a model family: the one interface that adapters fill in."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from exporter.errors import InputError
from exporter.models.channel_folds import ChannelFold
from exporter.models.config import TransformerConfig
from exporter.models.inputs import HIDDEN_STATES, TIMESTEP, Condition, TransformerInputs
from exporter.models.text_encoders import TextEncoder

# The autoencoder of all these families maps 8 x 8 pixels to one latent pixel; sizes as conditions are in pixels.
PIXELS_PER_LATENT = 8

# DiT's and PixArt's noise schedule, as diffusers' schedulers name it.
LINEAR_NOISE: Mapping[str, Any] = MappingProxyType(
    {
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
    }
)

_Array = TypeVar("_Array", Tensor, npt.NDArray[np.float32])


class Adapter(ABC):
    """A family's conventions. Stateless towards the model, which is always an argument.

    A family is one file with one subclass: facts as class attributes, and the methods that are abstract here. Blocks
    take the residual stream as their first positional argument and return it; all else that they take are keyword
    arguments, the same for all blocks but for `skips`.
    """

    family: str
    class_name: str
    # Module paths (* and ?) that no preset quantizes; a recipe's rule can.
    high_precision: tuple[str, ...]
    # Linear layers whose weights are read without calling the layer, or that run more than once: no rule can either.
    never_quantized: ClassVar[tuple[str, ...]] = ()
    blocks_path: str = "transformer_blocks"
    # A module that every block stores, in published checkpoints with the same weights; "" without one.
    stored_by_every_block: ClassVar[str] = ""
    # The noise schedule of a checkpoint without a scheduler; None where the family's versions differ.
    training_noise: ClassVar[Mapping[str, Any] | None] = LINEAR_NOISE

    config_class: type[TransformerConfig]

    def parse_config(self, config: dict[str, Any]) -> TransformerConfig:
        """Check a config.json's content. Raises pydantic's `ValidationError`."""
        return self.config_class.model_validate(config)

    @abstractmethod
    def conditions(self, model: nn.Module) -> tuple[Condition, ...]:
        """The inputs that follow the prompt, in the graph's order."""

    @abstractmethod
    def create(self, config: dict[str, Any]) -> nn.Module:
        """A model with parameters on the meta device (no memory) and real buffers."""

    @abstractmethod
    def forward_module(self, model: nn.Module, inputs: TransformerInputs) -> nn.Module:
        """A module whose parameters are `input_names`, in order, and whose output is the raw prediction.

        `inputs` show the sizes, which may decide constants.
        """

    @abstractmethod
    def channel_folds(self, model: nn.Module) -> tuple[ChannelFold, ...]:
        """Where `method.balance` can change the inputs of linear layers for free."""

    def config(self, model: nn.Module) -> TransformerConfig:
        """The checked config of a loaded model."""
        return self.parse_config(config_of(model))

    def text_encoders(self, pipeline: str) -> tuple[TextEncoder, ...]:
        """The text encoders that a diffusers pipeline of the class `pipeline` makes the conditions with."""
        return ()

    def size_conditions(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the inputs that follow the image's size, which `with_conditions` fills in."""
        return ()

    def negative_label(self, model: nn.Module) -> int:
        """The class label that goes without a prompt, in a family that takes labels."""
        raise NotImplementedError(f"{self.family} takes no class labels")

    def kept_layers(self, model: nn.Module) -> tuple[str, ...]:
        """Module paths or patterns of the layers that stay in high precision unless a rule names them."""
        return self.high_precision

    def skips(self, model: nn.Module) -> Mapping[str, Mapping[str, str]]:
        """Module path of a block → its keyword arguments that are an earlier block's output → that block's path."""
        return {}

    def share_weights(self, model: nn.Module) -> None:  # noqa: B027 - most families have nothing to share
        """Let modules that a checkpoint stores several times over be one, where their weights are equal."""

    def input_names(self, model: nn.Module) -> list[str]:
        """Names of the exported graph's inputs, in order; its one output is `sample`."""
        conditions = [condition.input for condition in self.conditions(model)]
        return [HIDDEN_STATES, *conditions[:1], TIMESTEP, *conditions[1:], *self.size_conditions(model)]

    def latent_shape(self, model: nn.Module, resolution: int | None = None) -> tuple[int, int, int]:
        """(C, H, W) of one sample; `resolution` is the latent's side, None means the config's `sample_size`.

        Raises `InputError` when the patches do not tile it.
        """
        facts = self.config(model)
        side = facts.sample_size if resolution is None else resolution
        if side % facts.patch_size:
            below = side - side % facts.patch_size
            raise InputError(
                f"model.resolution: {side} is not a multiple of the model's patch_size {facts.patch_size}; "
                f"nearest: {below or facts.patch_size}"
            )
        return facts.in_channels, side, side

    def tokens(self, model: nn.Module, latent_shape: tuple[int, int, int]) -> int:
        """Tokens of a sample in the blocks."""
        return latent_shape[1] * latent_shape[2] // self.config(model).patch_size ** 2

    def block_output_size(self, model: nn.Module, latent_shape: tuple[int, int, int]) -> int:
        """Numbers in a block's output per sample."""
        return self.tokens(model, latent_shape) * self.config(model).inner_dim

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """(module path, module) of the transformer blocks, in order of execution."""
        blocks = cast(nn.ModuleList, model.get_submodule(self.blocks_path))
        return [(f"{self.blocks_path}.{index}", block) for index, block in enumerate(blocks)]

    def with_conditions(self, model: nn.Module, inputs: TransformerInputs) -> TransformerInputs:
        """`inputs` with exactly the conditions that the model takes; those that follow the size are filled in."""
        sizes = self.size_conditions(model)
        made = {name: self.size_condition(name, inputs) for name in sizes if name not in inputs.conditions}
        known = {**inputs.conditions, **made}
        names = [name for name in self.input_names(model) if name in known]
        if names == list(inputs.conditions):
            return inputs
        return replace(inputs, conditions={name: known[name] for name in names})

    def size_condition(self, name: str, inputs: TransformerInputs) -> Tensor:
        """The condition `name` of `size_conditions` for the latents in `inputs`: [B, ...]."""
        raise NotImplementedError(f"{self.family} has no condition {name} on the image's size")

    def example_inputs(
        self, model: nn.Module, batch: int, tokens: int, resolution: int | None = None
    ) -> TransformerInputs:
        """Seeded random inputs of the right shapes, `tokens` caption tokens each, none of them masked."""
        generator = torch.Generator().manual_seed(0)
        inputs = TransformerInputs(
            hidden_states=torch.randn(batch, *self.latent_shape(model, resolution), generator=generator),
            timestep=torch.linspace(999.0, 1.0, batch).round(),
            conditions={
                condition.input: condition.random(batch, tokens, generator) for condition in self.conditions(model)
            },
        )
        return self.with_conditions(model, inputs)

    def forward(self, model: nn.Module, inputs: TransformerInputs) -> Tensor:
        """The raw output [B, C_out, H, W], conditions on the size added where the model needs them."""
        complete = self.with_conditions(model, inputs)
        tensors = complete.as_dict()
        output: Tensor = self.forward_module(model, complete)(*(tensors[name] for name in self.input_names(model)))
        return output

    def predict_noise(self, model: nn.Module, inputs: TransformerInputs) -> Tensor:
        """The noise prediction [B, C_in, H, W]: the raw output without its variance half, if it has one."""
        return self.noise_prediction(self.forward(model, inputs), model)

    def noise_prediction(self, raw_output: _Array, model: nn.Module) -> _Array:
        """The first C_in channels of a raw output [B, C_out, H, W], torch or numpy (a view)."""
        return raw_output[:, : self.config(model).in_channels]


def config_of(model: nn.Module) -> dict[str, Any]:
    """The config that diffusers keeps with a model."""
    return dict(cast(Any, model).config)


def create_on_meta(model_class: type, config: Mapping[str, Any]) -> nn.Module:
    """diffusers' model of that config, on the meta device.

    Old checkpoints carry keys that diffusers has dropped since, and it would warn about each.
    """
    known = inspect.signature(model_class).parameters
    with torch.device("meta"):
        model: nn.Module = model_class(**{key: value for key, value in config.items() if key in known})
    return model


def restore_position_embedding(model: nn.Module, facts: TransformerConfig, interpolation_scale: float) -> None:
    """Compute the buffer of `pos_embed` (diffusers' `PatchEmbed`) anew: it is not stored, so no checkpoint has it."""
    from diffusers.models.embeddings import PatchEmbed

    embed_class: Any = PatchEmbed
    embed = embed_class(
        height=facts.sample_size,
        width=facts.sample_size,
        patch_size=facts.patch_size,
        in_channels=facts.in_channels,
        embed_dim=facts.inner_dim,
        interpolation_scale=interpolation_scale,
    )
    model.get_submodule("pos_embed").register_buffer("pos_embed", embed.pos_embed, persistent=False)
