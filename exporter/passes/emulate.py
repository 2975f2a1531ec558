"""Passes that turn a lowered graph into one that ONNX Runtime runs, where its own types are beyond ONNX Runtime."""

from __future__ import annotations

from exporter.passes.driver import Pass
from exporter.passes.emulate_compute import round_to_compute_type
from exporter.targets import Target

EMULATION_PASSES: tuple[Pass, ...] = (round_to_compute_type,)


def emulation_passes(target: Target) -> tuple[Pass, ...]:
    """The passes that stand in for the target's types; none where ONNX Runtime is the target itself."""
    return () if target.engine == "onnxruntime" else EMULATION_PASSES
