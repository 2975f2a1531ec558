"""Graphs of one linear layer, lowered by the real passes."""

from __future__ import annotations

from pathlib import Path

import onnx

from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.targets import TARGETS
from plugins.kernels.library import KernelLibrary, LibraryKernel
from plugins.kernels.spec import Launch, Pointer
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


def write_library(folder: Path, op_type: str = "Scale_k64") -> Path:
    """A library with one kernel of the operator for Orin."""
    kernel = LibraryKernel(
        op_type=op_type,
        tactic=0,
        capability=(8, 7),
        entry="scale_k64_sm87_t0",
        inputs=(Pointer("x", "fp16"),),
        scalars=("rows",),
        outputs=(Pointer("y", "fp16"),),
        launch=Launch(1, 1, 4),
        shared_bytes=0,
        ptx_version=85,
        ptx=".version 8.5",
    )
    KernelLibrary((kernel,), "by hand").save(folder)
    return folder
