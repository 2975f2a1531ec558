"""What a recipe may say about the linear layers that a rule matches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from exporter.errors import did_you_mean
from exporter.model_section import Section, Text
from plugins.block_scales import BLOCK_SCALINGS
from plugins.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS

ContainerChoice = Literal["auto", "int8", "fp8", "fp16"]
Scales = Literal["channel", "group", "foldable", "nvfp4", "mx"]
HadamardSize = Literal[0, 4, 16, 64, 256]
HADAMARD_SIZES: tuple[int, ...] = get_args(HadamardSize)

HIGH_PRECISION = "none"
AUTO_FORMAT = "auto"
"""A rule's weight format that is chosen layer by layer, by what the candidates cost the block's output."""


def known(name: str, kind: str, names: Sequence[str]) -> str:
    """The name, if it is one of `names`. Raises `ValueError` with the nearest of them."""
    if name not in names:
        raise ValueError(f"unknown {kind} {name!r}{did_you_mean(name, names)}")
    return name


def _weight_format(name: str) -> str:
    return known(name, "format", (*WEIGHT_FORMATS, HIGH_PRECISION, AUTO_FORMAT))


def _activation_format(name: str) -> str:
    return known(name, "activation format", (*ACTIVATION_FORMATS, HIGH_PRECISION))


class LayerRule(Section):
    """Formats for the layers whose module path matches; the first matching rule wins.

    What a rule leaves out comes from the preset. `weight: none` keeps the layers in high precision, `weight: auto`
    chooses among the floats of as many bits as the preset's weights have.
    """

    match: Text = Field(description="a module path, * and ? allowed")
    weight: Annotated[str, AfterValidator(_weight_format)] | None = None
    group: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="weights that share a scale; 0: the whole row"
    )
    scales: Scales | None = None
    activation: Annotated[str, AfterValidator(_activation_format)] | None = None
    container: ContainerChoice | None = Field(
        default=None, description="number type of the products; unset: the recipe's"
    )
    low_rank: Annotated[int, Field(ge=0)] = Field(
        default=0, description="rank of the weight's part that is multiplied in high precision beside the rest"
    )
    hadamard: HadamardSize = Field(
        default=0, description="size of the Hadamard matrices that rotate the input in front of its quantizer"
    )
    output: Annotated[str, AfterValidator(_activation_format)] = Field(
        default=HIGH_PRECISION, description="format that the output is rounded to, for example what attention reads"
    )
    output_group: Annotated[int, Field(ge=0)] = Field(
        default=0, description="numbers of the output that share a scale, such as a head's; 0: the whole token"
    )

    @model_validator(mode="after")
    def _agree(self) -> LayerRule:
        details = (self.group, self.scales, self.activation, self.container)
        if self.weight == HIGH_PRECISION and any(value not in (None, HIGH_PRECISION) for value in details):
            raise ValueError(
                "`weight: none` keeps the layer in high precision: drop group, scales, activation and container"
            )
        if self.weight == HIGH_PRECISION and (self.low_rank or self.hadamard or self.output != HIGH_PRECISION):
            raise ValueError("`weight: none` keeps the layer in high precision: drop low_rank, hadamard and output")
        if self.output_group and self.output == HIGH_PRECISION:
            raise ValueError(
                f"`output_group: {self.output_group}` is for outputs that are quantized: name their format, for "
                "example `output: e4m3`, or drop it"
            )
        if self.group and self.scales == "channel":
            raise ValueError(
                f"`scales: channel` has one scale per row, but group is {self.group}; "
                "use `scales: foldable` (or group), or `group: 0`"
            )
        block = BLOCK_SCALINGS.get(self.scales or "")
        if block is not None and self.group not in (None, block.group_size):
            raise ValueError(f"`scales: {block.name}` has groups of {block.group_size}; drop `group: {self.group}`")
        if self.group == 0 and self.scales in ("group", "foldable"):
            raise ValueError(f"`scales: {self.scales}` needs a group size, for example `group: 128`")
        return self
