"""Tiny transformers of every family with random weights, and prompts for them."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel, HunyuanDiT2DModel, PixArtTransformer2DModel
from torch import Tensor, nn

CLIP_TOKENS, T5_TOKENS = 5, 7
CLIP_WIDTH, T5_WIDTH = 32, 24
SIDE = 8


def hunyuan(*, sizes: bool = True, blocks: int = 4) -> HunyuanDiT2DModel:
    """Of two blocks none takes a skip, of four the last, of six the last two; `sizes`: version 1.1's conditions."""
    torch.manual_seed(1)
    return HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=3,
        patch_size=2,
        sample_size=SIDE,
        hidden_size=64,
        num_layers=blocks,
        mlp_ratio=2.0,
        cross_attention_dim=CLIP_WIDTH,
        cross_attention_dim_t5=T5_WIDTH,
        pooled_projection_dim=20,
        text_len=CLIP_TOKENS,
        text_len_t5=T5_TOKENS,
        use_style_cond_and_image_meta_size=sizes,
    ).eval()


def dit() -> DiTTransformer2DModel:
    """Two blocks, ten classes."""
    torch.manual_seed(2)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=3,
        out_channels=6,
        num_layers=2,
        sample_size=SIDE,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()


def pixart(*, sizes: bool = False) -> PixArtTransformer2DModel:
    """Two blocks; `sizes`: with micro-conditions, which the pipeline gives to models of its largest size alone."""
    torch.manual_seed(3)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        # A multiple of 3 with micro-conditions, of which there are three numbers.
        attention_head_dim=48 if sizes else 32,
        in_channels=3,
        out_channels=6,
        num_layers=2,
        cross_attention_dim=96 if sizes else 64,
        caption_channels=T5_WIDTH,
        sample_size=128 if sizes else SIDE,
        patch_size=16 if sizes else 2,
        use_additional_conditions=sizes,
    ).eval()


def strengthen(model: nn.Module) -> None:
    """Larger weights in the blocks: fresh blocks are nearly the identity, in which errors would hide."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "blocks." in name and parameter.ndim == 2:
                parameter.mul_(2.0)


def prompt_tensors(keys: dict[str, tuple[int, int]], count: int = 2) -> dict[str, Tensor]:
    """A prompts file: for suffix → (tokens, width) embeddings and masks of `count` prompts and one negative prompt."""
    generator = torch.Generator().manual_seed(7)
    tensors: dict[str, Tensor] = {}
    for suffix, (tokens, width) in keys.items():
        for prefix, rows in (("", count), ("negative_", 1)):
            mask = torch.ones(rows, tokens, dtype=torch.int64)
            mask[-1, 3:] = 0
            tensors[f"{prefix}prompt_embeds{suffix}"] = torch.randn(rows, tokens, width, generator=generator)
            tensors[f"{prefix}prompt_attention_mask{suffix}"] = mask
    return tensors


HUNYUAN_KEYS = {"": (CLIP_TOKENS, CLIP_WIDTH), "_2": (T5_TOKENS, T5_WIDTH)}
PIXART_KEYS = {"": (T5_TOKENS, T5_WIDTH)}
