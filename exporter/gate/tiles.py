"""A tiled graph against the same graph without its tiles, which is the one that is compared with the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from exporter.gate.records import OUTPUT, Reference
from exporter.gate.runs import run_graph
from exporter.gate.table import GateRow, Stage
from exporter.gate.whole import tiles_row
from exporter.onnx_files import save_onnx


def compare_tiles(path: Path, plain: onnx.ModelProto, reference: Reference, stage: Stage, copy: Path) -> GateRow:
    """Run the tiled file and `plain`, which is written to `copy`, on the captured inputs: equal bit for bit, or failed.

    Raises:
        FidelityError: one of them cannot be run.
    """
    feeds = [dict(model.inputs) for model in reference.models]
    tiled = run_graph(path, feeds, optimized=True)
    save_onnx(plain, copy)
    whole = run_graph(copy, feeds, optimized=True)
    equal = all(np.array_equal(one[OUTPUT], other[OUTPUT]) for one, other in zip(tiled, whole, strict=True))
    return tiles_row(stage, equal=equal)
