"""What a recipe may say about the report."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from exporter.model_section import Count, Section, Seed, Text


class EvaluationSection(Section):
    """What the report measures on the finished model."""

    samples: Count = Field(default=1000, description="guided samples that the classifier judges")
    classifier: Text | None = Field(default=None, description="an ONNX file: samples [B, C, H, W] -> logits")
    seed: Seed = 1
    trajectories: Count = Field(default=16, description="held-out trajectories for the noise-prediction SNR")
    grid: Annotated[int, Field(ge=1, le=400)] = Field(default=20, description="samples shown in the report")
