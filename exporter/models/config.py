"""config.json of a PixArt transformer, checked before any of it reaches diffusers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# The largest sizes taken for real: a mistyped config must not ask for terabytes.
_MOST_LAYERS = 1000
_WIDEST = 1 << 17


class PixArtConfig(BaseModel):
    """The fields of diffusers' `PixArtTransformer2DModel` config that decide shapes, and their defaults."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    num_attention_heads: int = Field(default=16, ge=1, le=_WIDEST)
    attention_head_dim: int = Field(default=72, ge=1, le=_WIDEST)
    in_channels: int = Field(default=4, ge=1, le=_WIDEST)
    out_channels: int | None = Field(default=8, ge=1, le=_WIDEST)
    num_layers: int = Field(default=28, ge=1, le=_MOST_LAYERS)
    cross_attention_dim: int = Field(default=1152, ge=1, le=_WIDEST)
    caption_channels: int | None = Field(default=None, ge=1, le=_WIDEST)
    sample_size: int = Field(default=128, ge=1, le=_WIDEST)
    patch_size: int = Field(default=2, ge=1, le=_WIDEST)
    activation_fn: Literal["gelu-approximate", "gelu", "geglu", "geglu-approximate", "swiglu", "linear-silu"] = (
        "gelu-approximate"
    )
    norm_type: Literal["ada_norm_single"] = "ada_norm_single"
    use_additional_conditions: bool | None = None
    interpolation_scale: float | None = Field(default=None, gt=0)

    @property
    def inner_dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

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
        if self.inner_dim > _WIDEST:
            raise ValueError(f"num_attention_heads * attention_head_dim is {self.inner_dim}, over {_WIDEST}")
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
        if self.sample_size % self.patch_size:
            raise ValueError(f"sample_size {self.sample_size} is not a multiple of patch_size {self.patch_size}")
        if self.caption_channels is not None and self.cross_attention_dim != self.inner_dim:
            raise ValueError(
                f"cross_attention_dim is {self.cross_attention_dim}, but the caption projection gives "
                f"{self.inner_dim} (num_attention_heads * attention_head_dim)"
            )
        if self.out_channels not in (None, self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"out_channels is {self.out_channels}; a noise prediction has in_channels "
                f"({self.in_channels}) or, with a variance, {2 * self.in_channels}"
            )
        return self
