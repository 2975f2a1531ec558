"""A PixArt-α transformer with random weights that have the outliers of trained ones."""

from __future__ import annotations

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

BLOCKS = 28
CAPTION_TOKENS = 120
# Trained weights are heavy-tailed, and some input channels are a few times larger than others.
_TAIL = 5.0
_CHANNEL_SPREAD = 0.4
# Trained residual streams have a few channels that are tens of times larger than the median one.
_OUTLIER_CHANNELS = 8
_OUTLIER_GAIN = 20.0


def random_pixart(blocks: int = BLOCKS, seed: int = 0) -> nn.Module:
    """PixArt-α 512 (1024 tokens of 1152, 4608 inside) with `blocks` of its 28 blocks.

    Weights of the blocks are Student-t with 5 degrees of freedom, their input channels log-normal (σ = 0.4), and 8
    channels of the residual stream are 20 times as large as the others.
    """
    torch.manual_seed(seed)
    model: nn.Module = PixArtTransformer2DModel(
        sample_size=64,
        num_layers=blocks,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_attention_heads=16,
        attention_head_dim=72,
        cross_attention_dim=1152,
        caption_channels=4096,
        use_additional_conditions=False,
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.startswith("transformer_blocks."):
                module.weight.copy_(_heavy_tailed(module.weight.shape, generator))
                if module.bias is not None:
                    module.bias.copy_(0.02 * torch.randn(module.bias.shape, generator=generator))
        outliers = torch.randperm(1152, generator=generator)[:_OUTLIER_CHANNELS]
        model.get_parameter("pos_embed.proj.weight")[outliers] *= _OUTLIER_GAIN
    return model


def _heavy_tailed(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Student-t numbers, a normal over the root of a mean of squares of others, times a gain per column."""
    normal = torch.randn(shape, generator=generator)
    chi = torch.zeros(shape)
    for _ in range(round(_TAIL)):
        chi += torch.randn(shape, generator=generator).square_()
    gains = torch.exp(_CHANNEL_SPREAD * torch.randn(shape[1], generator=generator))
    return normal.div_(chi.div_(_TAIL).sqrt_()).mul_(gains).mul_(0.6 / shape[1] ** 0.5)
