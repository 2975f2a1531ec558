"""Hunyuan-DiT 1.1 and 1.2: how diffusers' `HunyuanDiT2DModel` is called and what is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from exporter.models.adapter import PIXELS_PER_LATENT, Adapter, config_of, create_on_meta
from exporter.models.channel_folds import ChannelFold, behind_attention, behind_norm
from exporter.models.config import TransformerConfig, Width
from exporter.models.inputs import Condition, TransformerInputs
from exporter.models.text_encoders import TextEncoder

# The pipeline calls the original image 1024 x 1024 whatever is drawn, and takes it whole, in the only style.
_ORIGINAL_PIXELS = 1024
# Rotary positions are those of a 512 x 512 image, stretched to the one that is drawn.
_ROTARY_PIXELS = 512
_POOLER_HEADS = 8


class HunyuanConfig(TransformerConfig):
    """The fields of diffusers' `HunyuanDiT2DModel` config that decide shapes, and their defaults."""

    attention_head_dim: Width = 88
    hidden_size: Width = 1152
    mlp_ratio: float = Field(default=4.0, gt=0)
    learn_sigma: bool = True
    activation_fn: Literal["gelu-approximate", "gelu", "geglu", "geglu-approximate", "swiglu", "linear-silu"] = (
        "gelu-approximate"
    )
    cross_attention_dim: Width = 1024
    cross_attention_dim_t5: Width = 2048
    pooled_projection_dim: Width = 1024
    text_len: Width = 77
    text_len_t5: Width = 256
    use_style_cond_and_image_meta_size: bool = True

    @model_validator(mode="after")
    def _agree(self) -> HunyuanConfig:
        if self.hidden_size != self.inner_dim:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, but num_attention_heads * attention_head_dim is {self.inner_dim}"
            )
        if self.num_layers % 2:
            raise ValueError(f"num_layers is {self.num_layers}; skips pair the blocks, so it must be even")
        if self.attention_head_dim % 4:
            raise ValueError(f"attention_head_dim is {self.attention_head_dim}; rotary embeddings need a multiple of 4")
        if self.cross_attention_dim_t5 % _POOLER_HEADS:
            raise ValueError(
                f"cross_attention_dim_t5 is {self.cross_attention_dim_t5}; its pooling has {_POOLER_HEADS} heads"
            )
        return self


class _Forward(nn.Module):
    """The transformer with positional inputs and its plain output, as torch.export wants it; one image size."""

    cosines: Tensor
    sines: Tensor

    def __init__(self, transformer: nn.Module, rotary: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.transformer = transformer
        self.register_buffer("cosines", rotary[0], persistent=False)
        self.register_buffer("sines", rotary[1], persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        text_embedding_mask: Tensor,
        encoder_hidden_states_t5: Tensor,
        text_embedding_mask_t5: Tensor,
        image_meta_size: Tensor | None = None,
    ) -> Tensor:
        style = None if image_meta_size is None else torch.zeros_like(timestep, dtype=torch.int64)
        output: Tensor = self.transformer(
            hidden_states,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            text_embedding_mask=text_embedding_mask,
            encoder_hidden_states_t5=encoder_hidden_states_t5,
            text_embedding_mask_t5=text_embedding_mask_t5,
            image_meta_size=image_meta_size,
            style=style,
            image_rotary_emb=(self.cosines, self.sines),
            return_dict=False,
        )[0]
        return output


class HunyuanAdapter(Adapter):
    """Inputs beside latents and timestep: CLIP's encoder_hidden_states [B, 77, D] with text_embedding_mask [B, 77],
    mT5's encoder_hidden_states_t5 [B, 256, D] with text_embedding_mask_t5 [B, 256]; up to version 1.1 image_meta_size
    [B, 6] (original and drawn height and width in pixels, crop).

    The rotary embedding follows the image's size and the style embedding has one row, so both are constants.
    """

    family = "hunyuan"
    class_name = "HunyuanDiT2DModel"
    config_class = HunyuanConfig
    # Embedders run once per image or on the caption alone; the final projection's error lands in the sample undamped.
    high_precision = ("pos_embed.*", "time_extra_emb.*", "text_embedder.*", "norm_out.*", "proj_out")
    never_quantized = ("time_extra_emb.pooler.*",)
    blocks_path = "blocks"
    training_noise = None

    def config(self, model: nn.Module) -> HunyuanConfig:
        return HunyuanConfig.model_validate(config_of(model))

    def create(self, config: dict[str, Any]) -> nn.Module:
        from diffusers import HunyuanDiT2DModel

        return create_on_meta(HunyuanDiT2DModel, config)

    def conditions(self, model: nn.Module) -> tuple[Condition, ...]:
        facts = self.config(model)
        clip, t5 = facts.text_len, facts.text_len_t5
        return (
            Condition("encoder_hidden_states", "prompt_embeds", (clip, facts.cross_attention_dim)),
            Condition("text_embedding_mask", "prompt_attention_mask", (clip,), "mask", of="prompt_embeds"),
            Condition("encoder_hidden_states_t5", "prompt_embeds_2", (t5, facts.cross_attention_dim_t5)),
            Condition("text_embedding_mask_t5", "prompt_attention_mask_2", (t5,), "mask", of="prompt_embeds_2"),
        )

    def text_encoders(self, pipeline: str) -> tuple[TextEncoder, ...]:
        return (
            TextEncoder("prompt_embeds", "prompt_attention_mask", "tokenizer", "text_encoder", 77, lower_case=False),
            TextEncoder(
                "prompt_embeds_2", "prompt_attention_mask_2", "tokenizer_2", "text_encoder_2", 256, lower_case=False
            ),
        )

    def size_conditions(self, model: nn.Module) -> tuple[str, ...]:
        return ("image_meta_size",) if self.config(model).use_style_cond_and_image_meta_size else ()

    def size_condition(self, name: str, inputs: TransformerInputs) -> Tensor:
        height, width = (side * PIXELS_PER_LATENT for side in inputs.hidden_states.shape[-2:])
        values = [float(value) for value in (_ORIGINAL_PIXELS, _ORIGINAL_PIXELS, height, width, 0, 0)]
        return inputs.hidden_states.new_tensor(values).repeat(inputs.batch, 1)

    def skips(self, model: nn.Module) -> Mapping[str, Mapping[str, str]]:
        """Blocks behind the middle take the outputs of those before it, the last one's first."""
        names = [name for name, _ in self.blocks(model)]
        middle = len(names) // 2
        sources = names[: max(middle - 1, 0)]
        return {name: {"skip": source} for name, source in zip(names[middle + 1 :], reversed(sources), strict=True)}

    def channel_folds(self, model: nn.Module) -> tuple[ChannelFold, ...]:
        """All inputs but those of the second feed-forward layer, and the text that cross-attention reads."""
        folds = []
        for block, module in self.blocks(model):
            attention = tuple(f"{block}.attn1.to_{part}" for part in "qkv")
            folds.append(behind_norm(f"{block}.norm1.norm", attention, added=f"{block}.norm1.linear"))
            folds.append(behind_norm(f"{block}.norm2", (f"{block}.attn2.to_q",)))
            folds.append(behind_norm(f"{block}.norm3", (f"{block}.ff.net.0.proj",)))
            folds += behind_attention(model, (f"{block}.attn1", f"{block}.attn2"))
            if getattr(module, "skip_linear", None) is not None:
                folds.append(behind_norm(f"{block}.skip_norm", (f"{block}.skip_linear",)))
        return tuple(folds)

    def forward_module(self, model: nn.Module, inputs: TransformerInputs) -> nn.Module:
        return _Forward(model, self._rotary(model, inputs.hidden_states))

    def _rotary(self, model: nn.Module, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [tokens, head dimension] of the latents' patches, as the pipeline makes them."""
        from diffusers.models.embeddings import get_2d_rotary_pos_embed

        facts = self.config(model)
        grid = (latents.shape[-2] // facts.patch_size, latents.shape[-1] // facts.patch_size)
        base = _ROTARY_PIXELS // PIXELS_PER_LATENT // facts.patch_size
        # The grid's longer side spans the base, the shorter one its middle.
        sides = [round(base * side / max(grid)) for side in grid]
        start = [round((base - side) / 2) for side in sides]
        region = (tuple(start), tuple(begin + side for begin, side in zip(start, sides, strict=True)))
        embedding: Any = get_2d_rotary_pos_embed
        cosines, sines = embedding(facts.attention_head_dim, region, grid, device=latents.device, output_type="pt")
        return cosines, sines
