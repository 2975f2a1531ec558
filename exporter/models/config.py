"""config.json of a transformer, checked before any of it reaches diffusers: what all families' configs say."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

# The largest sizes taken for real: a mistyped config must not ask for terabytes.
_MOST_LAYERS = 1000
_WIDEST = 1 << 17

Layers = Annotated[int, Field(ge=1, le=_MOST_LAYERS)]
Width = Annotated[int, Field(ge=1, le=_WIDEST)]


class TransformerConfig(BaseModel):
    """The fields of a diffusers transformer's config that every family has."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    num_attention_heads: Width = 16
    attention_head_dim: Width = 72
    num_layers: Layers = 28
    in_channels: Width = 4
    sample_size: Width = 32
    patch_size: Width = 2

    @property
    def inner_dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    def check_output(self, out_channels: int | None) -> None:
        """Raise `ValueError` unless `out_channels` holds a noise prediction, alone or with a variance."""
        if out_channels not in (None, self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"out_channels is {out_channels}; a noise prediction has in_channels ({self.in_channels}) or, with a "
                f"variance, {2 * self.in_channels}"
            )

    @model_validator(mode="after")
    def _sizes_agree(self) -> TransformerConfig:
        if self.inner_dim > _WIDEST:
            raise ValueError(f"num_attention_heads * attention_head_dim is {self.inner_dim}, over {_WIDEST}")
        if self.sample_size % self.patch_size:
            raise ValueError(f"sample_size {self.sample_size} is not a multiple of patch_size {self.patch_size}")
        return self
