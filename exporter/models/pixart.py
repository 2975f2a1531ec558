"""PixArt-alpha and -Sigma: how diffusers' `PixArtTransformer2DModel` is called and what is quantized."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from exporter.errors import InputError
from exporter.models.config import PixArtConfig

# PixArt's autoencoder maps 8 x 8 pixels to one latent pixel; micro-conditions are given in pixels.
PIXELS_PER_LATENT = 8

_Array = TypeVar("_Array", Tensor, npt.NDArray[np.float32])


@dataclass(frozen=True)
class TransformerInputs:
    """One batch for the transformer, all float32; field names are the exported graph's input names.

    Shapes: hidden_states [B, C, H, W] (scaled by the scheduler), encoder_hidden_states [B, S, D],
    timestep [B], encoder_attention_mask [B, S] (1 keep, 0 drop); with micro-conditioning resolution [B, 2]
    (height, width in pixels) and aspect_ratio [B, 1] (height / width), otherwise None.
    """

    hidden_states: Tensor
    encoder_hidden_states: Tensor
    timestep: Tensor
    encoder_attention_mask: Tensor
    resolution: Tensor | None = None
    aspect_ratio: Tensor | None = None

    @property
    def batch(self) -> int:
        """How many samples."""
        return int(self.hidden_states.shape[0])

    def as_dict(self) -> dict[str, Tensor]:
        """Input name → tensor, in the graph's order, without the inputs this model does not have."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def as_numpy(self) -> dict[str, npt.NDArray[np.float32]]:
        """The same as contiguous arrays, as runtimes take them."""
        return {name: np.ascontiguousarray(tensor.numpy(force=True)) for name, tensor in self.as_dict().items()}

    def __getitem__(self, index: slice | Tensor) -> TransformerInputs:
        """The samples of the batch that a slice or an index tensor picks."""
        return TransformerInputs(**{name: tensor[index] for name, tensor in self.as_dict().items()})

    @classmethod
    def concatenate(cls, parts: Sequence[TransformerInputs]) -> TransformerInputs:
        """One batch out of several of the same kind."""
        batches = [part.as_dict() for part in parts]
        return cls(**{name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})


class _Forward(nn.Module):
    """The transformer with positional inputs and its plain output, as torch.export wants it."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        output: Tensor = self.transformer(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            added_cond_kwargs={"resolution": resolution, "aspect_ratio": aspect_ratio},
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )[0]
        return output


@dataclass(frozen=True)
class PixArtAdapter:
    """What the exporter needs to know about the family; stateless, so the model is always an argument."""

    family: str = "pixart"
    class_name: str = "PixArtTransformer2DModel"
    # Embedders run once per image or on one token; the final projection's error lands in the sample undamped.
    high_precision: tuple[str, ...] = ("pos_embed.*", "adaln_single.*", "caption_projection.*", "proj_out")

    def parse_config(self, config: dict[str, Any]) -> PixArtConfig:
        """Check a config.json's content. Raises pydantic's `ValidationError`."""
        return PixArtConfig.model_validate(config)

    def config(self, model: nn.Module) -> PixArtConfig:
        """The checked config of a loaded model."""
        return self.parse_config(dict(cast(Any, model).config))

    def create(self, config: dict[str, Any]) -> nn.Module:
        """A model with parameters on the meta device (no memory) and real buffers."""
        from diffusers import PixArtTransformer2DModel
        from diffusers.models.embeddings import PatchEmbed

        model_class: Any = PixArtTransformer2DModel
        embed_class: Any = PatchEmbed
        # Old checkpoints carry keys that diffusers has dropped since, and it would warn about each.
        known = inspect.signature(model_class.__init__).parameters
        with torch.device("meta"):
            model: nn.Module = model_class(**{key: value for key, value in config.items() if key in known})
        facts = self.parse_config(config)
        embed = embed_class(
            height=facts.sample_size,
            width=facts.sample_size,
            patch_size=facts.patch_size,
            in_channels=facts.in_channels,
            embed_dim=facts.inner_dim,
            interpolation_scale=config.get("interpolation_scale") or max(facts.sample_size // 64, 1),
        )
        # Position embeddings are computed, not stored, so no checkpoint has them.
        model.get_submodule("pos_embed").register_buffer("pos_embed", embed.pos_embed, persistent=False)
        return model

    def input_names(self, model: nn.Module) -> list[str]:
        """Names of the exported graph's inputs, in order; its one output is `sample`."""
        names = ["hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask"]
        return names + ["resolution", "aspect_ratio"] * self.config(model).micro_conditioned

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

    def caption_dim(self, model: nn.Module) -> int:
        """Width D of the prompt embeddings that the model takes."""
        return self.config(model).caption_dim

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """(module path, module) of the transformer blocks, in order of execution."""
        blocks = cast(nn.ModuleList, model.get_submodule("transformer_blocks"))
        return [(f"transformer_blocks.{index}", block) for index, block in enumerate(blocks)]

    def forward_module(self, model: nn.Module) -> nn.Module:
        """A module whose positional inputs are `input_names` and whose output is the raw prediction."""
        return _Forward(model)

    def with_conditions(self, model: nn.Module, inputs: TransformerInputs) -> TransformerInputs:
        """`inputs` with the micro-conditions that the model needs, by the latent's size where missing."""
        if not self.config(model).micro_conditioned:
            return replace(inputs, resolution=None, aspect_ratio=None)
        if inputs.resolution is not None and inputs.aspect_ratio is not None:
            return inputs
        height, width = (side * PIXELS_PER_LATENT for side in inputs.hidden_states.shape[-2:])
        like = inputs.hidden_states
        resolution = like.new_tensor([float(height), float(width)]).repeat(inputs.batch, 1)
        aspect_ratio = like.new_tensor([height / width]).repeat(inputs.batch, 1)
        return replace(inputs, resolution=resolution, aspect_ratio=aspect_ratio)

    def example_inputs(
        self, model: nn.Module, batch: int, tokens: int, resolution: int | None = None
    ) -> TransformerInputs:
        """Seeded random inputs of the right shapes, `tokens` caption tokens each, none of them masked."""
        generator = torch.Generator().manual_seed(0)
        shape = self.latent_shape(model, resolution)
        inputs = TransformerInputs(
            hidden_states=torch.randn(batch, *shape, generator=generator),
            encoder_hidden_states=torch.randn(batch, tokens, self.caption_dim(model), generator=generator),
            timestep=torch.linspace(999.0, 1.0, batch).round(),
            encoder_attention_mask=torch.ones(batch, tokens),
        )
        return self.with_conditions(model, inputs)

    def forward(self, model: nn.Module, inputs: TransformerInputs) -> Tensor:
        """The raw output [B, C_out, H, W], micro-conditions added where the model needs them."""
        output: Tensor = self.forward_module(model)(**self.with_conditions(model, inputs).as_dict())
        return output

    def predict_noise(self, model: nn.Module, inputs: TransformerInputs) -> Tensor:
        """The noise prediction [B, C_in, H, W]: the raw output without its variance half, if it has one."""
        return self.noise_prediction(self.forward(model, inputs), model)

    def call(
        self,
        model: nn.Module,
        hidden_states: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        prompt_attention_mask: Tensor,
    ) -> Tensor:
        """`predict_noise` on plain tensors (shapes as in `TransformerInputs`)."""
        inputs = TransformerInputs(
            hidden_states=hidden_states,
            encoder_hidden_states=prompt_embeds,
            timestep=timestep,
            encoder_attention_mask=prompt_attention_mask,
        )
        return self.predict_noise(model, inputs)

    def noise_prediction(self, raw_output: _Array, model: nn.Module) -> _Array:
        """The first C_in channels of a raw output [B, C_out, H, W], torch or numpy (a view)."""
        return raw_output[:, : self.config(model).in_channels]
