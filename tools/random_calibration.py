"""Random PixArts and inputs to calibrate them on, where only the cost counts."""

from __future__ import annotations

import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from exporter.calibration.capture import CalibrationSet
from exporter.calibration.inputs import CalibrationRun
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts

_CHANNELS, _CAPTION_CHANNELS = 4, 64


def random_blocks(depth: int, heads: int, head: int, side: int) -> nn.Module:
    """A PixArt of so many blocks, heads and channels a head, for latents of `side` × `side`."""
    torch.manual_seed(0)
    model: nn.Module = PixArtTransformer2DModel(
        num_layers=depth,
        num_attention_heads=heads,
        attention_head_dim=head,
        cross_attention_dim=heads * head,
        caption_channels=_CAPTION_CHANNELS,
        in_channels=_CHANNELS,
        out_channels=2 * _CHANNELS,
        sample_size=side,
        use_additional_conditions=False,
    )
    return model.eval().requires_grad_(False)


def random_run(inputs: int, side: int, captions: int) -> CalibrationRun:
    """So many random inputs for `random_blocks`, with a prompt of so many caption tokens."""
    generator = torch.Generator().manual_seed(0)
    captured = CalibrationSet(
        torch.randn(inputs, _CHANNELS, side, side, generator=generator),
        torch.linspace(999, 1, inputs).round(),
        torch.zeros(inputs, dtype=torch.int64),
        torch.zeros(inputs, dtype=torch.int64),
    )
    embeddings = torch.randn(1, captions, _CAPTION_CHANNELS, generator=generator)
    tensors = {"encoder_hidden_states": embeddings, "encoder_attention_mask": torch.ones(1, captions)}
    return CalibrationRun(PixArtAdapter(), captured, Prompts(tensors, tensors))
