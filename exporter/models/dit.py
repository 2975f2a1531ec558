"""DiT: how diffusers' class-conditional `DiTTransformer2DModel` is called and what is quantized."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from exporter.models.adapter import Adapter, config_of, create_on_meta, restore_position_embedding
from exporter.models.channel_folds import ChannelFold, behind_attention, behind_own_modulation
from exporter.models.config import TransformerConfig, Width
from exporter.models.inputs import Condition, TransformerInputs


class DiTConfig(TransformerConfig):
    """The fields of diffusers' `DiTTransformer2DModel` config that decide shapes, and their defaults."""

    out_channels: Width | None = None
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    # How many classes there are; one more embedding stands for no class.
    num_embeds_ada_norm: Width = 1000

    @model_validator(mode="after")
    def _agree(self) -> DiTConfig:
        if self.inner_dim % 4:
            raise ValueError(
                f"num_attention_heads * attention_head_dim is {self.inner_dim}, but position embeddings "
                "need a multiple of 4"
            )
        self.check_output(self.out_channels)
        return self


class _Forward(nn.Module):
    """The transformer with positional inputs and its plain output, as torch.export wants it."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, hidden_states: Tensor, class_labels: Tensor, timestep: Tensor) -> Tensor:
        output: Tensor = self.transformer(
            hidden_states, timestep=timestep, class_labels=class_labels, return_dict=False
        )[0]
        return output


class DiTAdapter(Adapter):
    """Inputs beside latents and timestep: class_labels int64 [B], the number of classes for "no class"."""

    family = "dit"
    class_name = "DiTTransformer2DModel"
    config_class = DiTConfig
    # The final projections' error lands in the sample undamped. Every block has its own embedders of timestep and
    # class (all alike in the published checkpoints); the first block's run a second time, for the final modulation.
    high_precision = ("pos_embed.*", "proj_out_1", "proj_out_2")
    never_quantized = ("transformer_blocks.*.norm1.emb.*",)
    stored_by_every_block = "norm1.emb"

    def config(self, model: nn.Module) -> DiTConfig:
        return DiTConfig.model_validate(config_of(model))

    def create(self, config: dict[str, Any]) -> nn.Module:
        from diffusers import DiTTransformer2DModel

        model = create_on_meta(DiTTransformer2DModel, config)
        restore_position_embedding(model, DiTConfig.model_validate(config), 1.0)
        return model

    def channel_folds(self, model: nn.Module) -> tuple[ChannelFold, ...]:
        """All inputs but that of the second feed-forward layer."""
        blocks = [name for name, _ in self.blocks(model)]
        folds = []
        for block in blocks:
            attention = tuple(f"{block}.attn1.to_{part}" for part in "qkv")
            folds.append(behind_own_modulation(f"{block}.norm1.linear", 0, attention))
            folds.append(behind_own_modulation(f"{block}.norm1.linear", 3, (f"{block}.ff.net.0.proj",)))
        return (*folds, *behind_attention(model, (f"{block}.attn1" for block in blocks)))

    def share_weights(self, model: nn.Module) -> None:
        """One embedder of timestep and class for all blocks that have the same one."""
        path = self.stored_by_every_block
        first, *others = (block for _, block in self.blocks(model))
        shared = first.get_submodule(path)
        weights = shared.state_dict()
        for block in others:
            own = block.get_submodule(path).state_dict()
            if all(torch.equal(tensor, own[name]) for name, tensor in weights.items()):
                block.set_submodule(path, shared)

    def conditions(self, model: nn.Module) -> tuple[Condition, ...]:
        classes = self.config(model).num_embeds_ada_norm
        return (Condition("class_labels", "class_labels", (), "label", classes=classes),)

    def negative_label(self, model: nn.Module) -> int:
        return self.config(model).num_embeds_ada_norm

    def forward_module(self, model: nn.Module, inputs: TransformerInputs) -> nn.Module:
        return _Forward(model)
