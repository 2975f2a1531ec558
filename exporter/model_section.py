"""The part of a recipe that names the transformer, and what all parts share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]

# The families that draw class labels instead of prompts.
LABELLED_FAMILIES = ("dit",)
# The families of which it is not known what is in front of the layers.
UNBALANCED_FAMILIES = ("generic",)


class Section(BaseModel):
    """A mapping of a recipe: unknown keys are errors, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """The transformer to export."""

    family: Literal["pixart", "hunyuan", "dit", "generic"] = "pixart"
    weights: Text = Field(description="the directory with the transformer in diffusers' layout, or a Hub id")
    variant: Annotated[str, Field(pattern=r"^\w+$")] | None = Field(
        default=None, description="which of the checkpoint's files, as diffusers names them, for example fp16"
    )
    revision: Text | None = Field(
        default=None, description="branch, tag or commit of a Hub id's repository; unset: its main branch"
    )
    resolution: Count | None = Field(
        default=None, description="side of the latent (image side / 8); unset: the config's sample_size"
    )
    inputs: dict[Text, Annotated[tuple[Count | None, ...], Field(strict=False)]] | None = Field(
        default=None, description="generic: inputs beside hidden_states and timestep, with one sample's sizes"
    )
    blocks: Text | None = Field(default=None, description="generic: module path of the list of blocks")

    @model_validator(mode="after")
    def _agree(self) -> ModelSection:
        if self.family != "generic" and (self.inputs is not None or self.blocks is not None):
            raise ValueError(f"inputs and blocks describe a model to family generic; {self.family} knows them")
        if self.family == "generic" and not self.inputs:
            raise ValueError(
                "family generic needs inputs: {encoder_hidden_states: [null, 4096]}, one sample's sizes each"
            )
        return self
