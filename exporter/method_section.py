"""What a recipe may say about how weights are rounded."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from exporter.model_section import Count, Section

LearningCompute = Literal["fp32", "bf16"]
Effort = Literal["fast", "default", "best"]

_EFFORTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "fast": {"name": "gptq"},
        "default": {"name": "fp4dit", "start": "gptq", "iterations": 250, "learning_rate": 0.01},
        "best": {
            "name": "fp4dit",
            "start": "gptq",
            "iterations": 1000,
            "learning_rate": 0.01,
            "regularization": 3000.0,
        },
    }
)
_SPELLED_OUT = ("name", "start", "iterations", "learning_rate")


class MethodSection(Section):
    """How weights are rounded; `iterations` and what follows are FP4DiT's (arXiv 2503.15465)."""

    effort: Effort | None = Field(
        default=None,
        description="sets name, start, iterations and learning_rate, best regularization too, where not given; unset "
        "and none of the first four given: default",
    )
    name: Literal["fp4dit", "gptq", "rtn"] = "fp4dit"
    start: Literal["nearest", "gptq"] = Field(
        default="nearest", description="the roundings that fp4dit begins with: the nearest, or those of error feedback"
    )
    iterations: Count = 2500
    batch_size: Count = 32
    learning_rate: Annotated[float, Field(gt=0)] = Field(default=0.03, description="relative to the group's amax")
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.2
    regularization: Annotated[float, Field(ge=0)] = Field(
        default=30.0,
        description="per weight, beside a loss of 1 for rounding to nearest (the paper's 0.01 is absolute)",
    )
    beta_start: Annotated[float, Field(gt=0)] = 20.0
    beta_end: Annotated[float, Field(gt=0)] = 2.0
    scale_search: Literal["absmax", "mse", "output"] = "output"
    step_weights: Literal["uniform", "trajectory"] = Field(
        default="uniform",
        description="what errors on captured inputs count: all alike, or as they move the finished sample",
    )
    balance: Literal[False, True, "exact"] = Field(
        default=False,
        description="balance the channels of inputs where the layers in front can do it for free; exact: by powers of "
        "two, so that weights in front keep their bits; unset: true with an effort, but for family generic",
    )
    quantize_activations: bool = Field(default=False, description="quantize activations while the rounding is learned")
    compute: LearningCompute = Field(
        default="fp32", description="type of the matrix products from which blocks learn; their errors are FP32's"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        effort = given.get("effort")
        return {**(_EFFORTS.get(effort, {}) if isinstance(effort, str) else {}), **given}

    @model_validator(mode="after")
    def _agree(self) -> MethodSection:
        if self.beta_end > self.beta_start:
            raise ValueError(f"beta_end {self.beta_end} is above beta_start {self.beta_start}; beta only falls")
        return self


def default_where_open(given: Any, *, balances: bool) -> Any:
    """What a recipe gives as its method; where that does not spell out how to round, with effort `default`, unless
    another is given, and balanced channels, which do best at no cost at inference.

    The fields' own defaults are for a method that is spelled out: kept measurements are named by what differs from
    them. `balances` says whether models of the family can be balanced.
    """
    if isinstance(given, MethodSection):
        given = given.model_dump(exclude_unset=True)
    if not isinstance(given, Mapping):
        return given
    has_effort = given.get("effort") is not None
    if not has_effort and any(given.get(key) is not None for key in _SPELLED_OUT):
        return given
    return {"balance": balances, **given, "effort": given["effort"] if has_effort else "default"}
