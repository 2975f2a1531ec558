"""Operations and bytes of one denoising step, from the models' own layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from diffusers import HunyuanDiT2DModel, PixArtTransformer2DModel
from torch import nn

from tools.scaling.hardware import Gpu

GUIDANCE = 2
"""Samples in a step: with and without the prompt."""


@dataclass(frozen=True)
class Model:
    """A transformer at one image size: the square's side in tokens, caption tokens, width and blocks."""

    name: str
    family: str
    side: int
    text_tokens: int
    width: int
    blocks: int

    @property
    def tokens(self) -> int:
        """Image tokens of a step."""
        return GUIDANCE * self.side**2


MODELS = (
    Model("PixArt-α 512", "pixart", 32, 120, 1152, 28),
    Model("PixArt-α 1024", "pixart", 64, 120, 1152, 28),
    Model("Hunyuan-DiT 1.2, 1024", "hunyuan", 64, 77 + 256, 1408, 40),
)


@dataclass(frozen=True)
class Linear:
    """`rows` tokens times a weight [n, k]; quantized or not. `shares_input`: another linear has had the same input."""

    rows: int
    n: int
    k: int
    quantized: bool
    shares_input: bool

    @property
    def operations(self) -> int:
        """A multiplication and an addition are two."""
        return 2 * self.rows * self.n * self.k


@dataclass(frozen=True)
class Precision:
    """Bits of quantized weights (with a byte for 128 of them where there are groups) and bytes of their inputs."""

    name: str
    weight_bits: float
    input_bytes: int
    eight_bit: bool

    def weight_bytes(self, linear: Linear) -> float:
        """As they are read: scales of channels included."""
        if not linear.quantized or not self.eight_bit:
            return 2 * linear.n * linear.k
        return linear.n * linear.k * self.weight_bits / 8 + 4 * linear.n


BF16 = Precision("BF16", 16, 2, eight_bit=False)
W8 = Precision("8-bit weights", 8, 1, eight_bit=True)
W4 = Precision("4-bit weights", 4 + 8 / 128, 1, eight_bit=True)
PRECISIONS = (BF16, W8, W4)


@cache
def _module(family: str) -> nn.Module:
    """The model without numbers."""
    with torch.device("meta"):
        if family == "pixart":
            pixart: nn.Module = PixArtTransformer2DModel(
                sample_size=64, caption_channels=4096, use_additional_conditions=False
            )
            return pixart
        hunyuan: nn.Module = HunyuanDiT2DModel(
            num_attention_heads=16,
            attention_head_dim=88,
            in_channels=4,
            patch_size=2,
            sample_size=128,
            hidden_size=1408,
            num_layers=40,
            mlp_ratio=4.3637,
            learn_sigma=True,
            cross_attention_dim=1024,
            cross_attention_dim_t5=2048,
            pooled_projection_dim=1024,
            text_len=77,
            text_len_t5=256,
            use_style_cond_and_image_meta_size=False,
        )
        return hunyuan


def parameters(model: Model) -> tuple[int, int]:
    """How many are in linears that are quantized, and how many elsewhere."""
    module = _module(model.family)
    inside = sum(linear.n * linear.k for linear in linears(model) if linear.quantized)
    return inside, sum(parameter.numel() for parameter in module.parameters()) - inside


def linears(model: Model) -> list[Linear]:
    """Every linear layer of a step."""
    return [
        Linear(
            _rows(name, model),
            module.out_features,
            module.in_features,
            quantized=name.startswith(("transformer_blocks.", "blocks.")),
            shares_input=name.endswith((".attn1.to_k", ".attn1.to_v", ".attn2.to_v")),
        )
        for name, module in _module(model.family).named_modules()
        if isinstance(module, nn.Linear)
    ]


def _rows(name: str, model: Model) -> int:
    """Text's keys and values see the caption's tokens, modulations one row a sample."""
    if ".attn2.to_k" in name or ".attn2.to_v" in name or name.startswith(("caption_projection", "text_embedder")):
        return GUIDANCE * model.text_tokens
    if any(part in name for part in (".attn", ".ff.", "skip_linear")) or name.startswith("proj_out"):
        return model.tokens
    return GUIDANCE


def attention_operations(model: Model) -> int:
    """Scores and weighted sums, to image and caption, of all blocks."""
    keys = model.side**2 + model.text_tokens
    return model.blocks * 4 * model.tokens * keys * model.width


def parts(model: Model, precision: Precision) -> Iterator[tuple[bool, int, float]]:
    """(in 8 bits, operations, bytes of memory traffic) of every linear and of each block's attention.

    A linear reads its weight and its input, and writes 16 bits. What makes an input (a norm, GELU, attention) is fused
    with its quantization: it reads 16 bits and writes the linear's input, once for those that share it. Attention reads
    and writes 16 bits, and no scores. Caches keep nothing from one operator to the next.
    """
    for linear in linears(model):
        in_eight = linear.quantized and precision.eight_bit
        width = precision.input_bytes if linear.quantized else 2
        made = 0 if linear.shares_input else 2 + width
        traffic = precision.weight_bytes(linear) + linear.rows * (linear.k * (made + width) + linear.n * 2)
        yield in_eight, linear.operations, traffic
    tokens = model.tokens + GUIDANCE * model.text_tokens
    for _ in range(model.blocks):
        yield False, attention_operations(model) // model.blocks, 2.0 * model.width * (4 * model.tokens + 2 * tokens)


def seconds(model: Model, precision: Precision, gpu: Gpu) -> tuple[float, float]:
    """The least time of a step, each operator at the slower of its two limits, and the part of it at memory's."""
    total = at_memory = 0.0
    for in_eight, operations, traffic in parts(model, precision):
        rate = gpu.eight_bit[1] if in_eight else gpu.bf16
        compute, memory = operations / (rate * 1e12), traffic / (gpu.bandwidth * 1e9)
        total += max(compute, memory)
        at_memory += memory if memory > compute else 0
    return total, at_memory


def weight_gigabytes(model: Model, precision: Precision) -> float:
    """Linears of the blocks in the precision, everything else in 16 bits."""
    return (
        sum(precision.weight_bytes(linear) for linear in linears(model) if linear.quantized) + 2 * parameters(model)[1]
    ) / 1e9


def activation_gigabytes(model: Model, precision: Precision) -> float:
    """What is alive inside a feed-forward: residual stream, its input, and the inner tensor before and after GELU."""
    inner = max(linear.n for linear in linears(model) if linear.quantized and linear.rows == model.tokens)
    width = precision.input_bytes
    return model.tokens * (model.width * (2 + width) + inner * (2 + width)) / 1e9
