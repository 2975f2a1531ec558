"""Graphs of one linear layer, lowered by the real passes."""

from __future__ import annotations

from pathlib import Path

import onnx

from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import make_weight, one_linear


def write_lowered(folder: Path, target: str, activation_format: str = "e2m3", weight_format: str = "e2m1") -> Path:
    """lowered.TARGET.onnx in `folder`: y = x·Wᵀ + b for x [batch, 5, 64], W [32, 64]."""
    kind = {"none": "group", "e4m3": "channel"}.get(activation_format, "foldable")
    weight = make_weight("fc", weight_format, 0 if kind == "channel" else 32, kind, features=32)
    passes = (*WAIST_PASSES, *lowering_passes(TARGETS[target]))
    model, _ = run_passes(one_linear(weight, activation_format), passes, TARGETS[target])
    path = folder / f"lowered.{target}.onnx"
    onnx.save(model, path)
    return path
