"""PixArt-alpha and -Sigma: how diffusers' `PixArtTransformer2DModel` is called and what is quantized."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from exporter.models.adapter import (
    PIXELS_PER_LATENT,
    Adapter,
    config_of,
    create_on_meta,
    restore_position_embedding,
)
from exporter.models.channel_folds import ChannelFold, behind_attention, behind_linear, behind_shared_modulation
from exporter.models.config import TransformerConfig, Width
from exporter.models.inputs import Condition, TransformerInputs
from exporter.models.text_encoders import TextEncoder


class PixArtConfig(TransformerConfig):
    """The fields of diffusers' `PixArtTransformer2DModel` config that decide shapes, and their defaults."""

    out_channels: Width | None = 8
    cross_attention_dim: Width = 1152
    caption_channels: Width | None = None
    sample_size: Width = 128
    activation_fn: Literal["gelu-approximate", "gelu", "geglu", "geglu-approximate", "swiglu", "linear-silu"] = (
        "gelu-approximate"
    )
    norm_type: Literal["ada_norm_single"] = "ada_norm_single"
    use_additional_conditions: bool | None = None
    interpolation_scale: float | None = Field(default=None, gt=0)

    @property
    def caption_dim(self) -> int:
        """Width of a prompt embedding: before the caption projection where there is one."""
        return self.cross_attention_dim if self.caption_channels is None else self.caption_channels

    @property
    def micro_conditioned(self) -> bool:
        """Whether `resolution` and `aspect_ratio` are inputs; unset, diffusers decides by the sample size."""
        if self.use_additional_conditions is None:
            return self.sample_size == 128
        return self.use_additional_conditions

    @model_validator(mode="after")
    def _agree(self) -> PixArtConfig:
        if self.inner_dim % 4:
            raise ValueError(
                f"num_attention_heads * attention_head_dim is {self.inner_dim}, but position embeddings "
                "need a multiple of 4"
            )
        if self.micro_conditioned and self.inner_dim % 3:
            raise ValueError(
                f"num_attention_heads * attention_head_dim is {self.inner_dim}, but micro-conditioning "
                "(use_additional_conditions, on by default for sample_size 128) needs a multiple of 3"
            )
        if self.caption_channels is not None and self.cross_attention_dim != self.inner_dim:
            raise ValueError(
                f"cross_attention_dim is {self.cross_attention_dim}, but the caption projection gives "
                f"{self.inner_dim} (num_attention_heads * attention_head_dim)"
            )
        self.check_output(self.out_channels)
        return self


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


class PixArtAdapter(Adapter):
    """Inputs beside latents and timestep: encoder_hidden_states [B, S, D], encoder_attention_mask [B, S]; with
    micro-conditioning resolution [B, 2] (height, width in pixels) and aspect_ratio [B, 1] (height / width).
    """

    family = "pixart"
    class_name = "PixArtTransformer2DModel"
    config_class = PixArtConfig
    # Embedders run once per image or on one token; the final projection's error lands in the sample undamped.
    high_precision = ("pos_embed.*", "adaln_single.*", "caption_projection.*", "proj_out")

    def config(self, model: nn.Module) -> PixArtConfig:
        return PixArtConfig.model_validate(config_of(model))

    def create(self, config: dict[str, Any]) -> nn.Module:
        from diffusers import PixArtTransformer2DModel

        model = create_on_meta(PixArtTransformer2DModel, config)
        facts = PixArtConfig.model_validate(config)
        restore_position_embedding(model, facts, facts.interpolation_scale or max(facts.sample_size // 64, 1))
        return model

    def conditions(self, model: nn.Module) -> tuple[Condition, ...]:
        width = self.config(model).caption_dim
        return (
            Condition("encoder_hidden_states", "prompt_embeds", (None, width)),
            Condition("encoder_attention_mask", "prompt_attention_mask", (None,), "mask", of="prompt_embeds"),
        )

    def channel_folds(self, model: nn.Module) -> tuple[ChannelFold, ...]:
        """What modulated norms give self-attention and feed-forward, what attention makes of its values, the captions.

        Not the queries of cross-attention, which read the residual stream, nor the second feed-forward layer's input.
        """
        blocks = [name for name, _ in self.blocks(model)]
        embedder, tables = "adaln_single.linear", [f"{block}.scale_shift_table" for block in blocks]
        attention = [tuple(f"{block}.attn1.to_{part}" for part in "qkv") for block in blocks]
        folds = [
            behind_shared_modulation(embedder, tables, 0, attention),
            behind_shared_modulation(embedder, tables, 3, [(f"{block}.ff.net.0.proj",) for block in blocks]),
            *behind_attention(model, (f"{block}.{kind}" for block in blocks for kind in ("attn1", "attn2"))),
        ]
        if self.config(model).caption_channels is not None:
            captions = tuple(f"{block}.attn2.to_{part}" for block in blocks for part in "kv")
            folds.append(behind_linear(model, "caption_projection.linear_2", captions))
        return tuple(folds)

    def text_encoders(self, pipeline: str) -> tuple[TextEncoder, ...]:
        tokens = 300 if pipeline == "PixArtSigmaPipeline" else 120
        return (
            TextEncoder("prompt_embeds", "prompt_attention_mask", "tokenizer", "text_encoder", tokens, lower_case=True),
        )

    def size_conditions(self, model: nn.Module) -> tuple[str, ...]:
        return ("resolution", "aspect_ratio") if self.config(model).micro_conditioned else ()

    def size_condition(self, name: str, inputs: TransformerInputs) -> Tensor:
        height, width = inputs.hidden_states.shape[-2:]
        pixels = [float(height * PIXELS_PER_LATENT), float(width * PIXELS_PER_LATENT)]
        values = pixels if name == "resolution" else [height / width]
        return inputs.hidden_states.new_tensor(values).repeat(inputs.batch, 1)

    def forward_module(self, model: nn.Module, inputs: TransformerInputs) -> nn.Module:
        return _Forward(model)
