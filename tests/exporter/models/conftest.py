"""Tiny PixArt checkpoints with random weights, written as diffusers writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

_SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 2,
    "cross_attention_dim": 32,
    "caption_channels": 8,
    "sample_size": 8,
    "patch_size": 2,
}
_MICRO = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 1,
    "cross_attention_dim": 24,
    "caption_channels": 12,
    "sample_size": 6,
    "patch_size": 1,
    "use_additional_conditions": True,
}
# diffusers turns micro-conditioning on by itself for this sample size.
_MICRO_BY_SIZE = {
    **_MICRO,
    "sample_size": 128,
    "patch_size": 32,
    "use_additional_conditions": None,
    "out_channels": None,
}
_UNPROJECTED = {**_SMALL, "caption_channels": None, "cross_attention_dim": 20, "out_channels": 2, "num_layers": 1}
_CONFIGS: dict[str, dict[str, Any]] = {
    "small": _SMALL,
    "micro": _MICRO,
    "micro_by_size": _MICRO_BY_SIZE,
    "unprojected": _UNPROJECTED,
}


@pytest.fixture
def make_model() -> Callable[[str], PixArtTransformer2DModel]:
    """Make the tiny model of this name with seeded random weights, as diffusers makes it."""

    def make(name: str) -> PixArtTransformer2DModel:
        torch.manual_seed(0)
        return PixArtTransformer2DModel(**_CONFIGS[name]).eval()

    return make


@pytest.fixture
def checkpoint(tmp_path: Path, make_model: Callable[[str], PixArtTransformer2DModel]) -> Callable[..., Path]:
    """Write a tiny model's checkpoint to a fresh folder, optionally in another type or in shards."""

    def write(name: str, *, dtype: torch.dtype = torch.float32, shard: str = "1GB") -> Path:
        folder = tmp_path / "model"
        make_model(name).to(dtype).save_pretrained(folder, max_shard_size=shard)
        return folder

    return write


@pytest.fixture
def prompt_tensors() -> dict[str, Tensor]:
    """Three prompts of five tokens, eight wide."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 5)
    mask[0, 3:] = 0
    return {
        "prompt_embeds": torch.randn(3, 5, 8, generator=generator),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": torch.randn(1, 5, 8, generator=generator),
        "negative_prompt_attention_mask": torch.ones(1, 5),
        "labels": torch.tensor([0, 1, 2]),
    }
