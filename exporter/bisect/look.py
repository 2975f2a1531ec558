"""One graph held against the reference: its blocks, what enters its layers, and its output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from exporter.bisect.suspect import Suspect
from exporter.gate.entering import InputRow, entering, input_rows
from exporter.gate.large import compare_segments
from exporter.gate.records import OUTPUT
from exporter.gate.runs import Arrays, run_graph
from exporter.gate.subgraphs import GivenTensor, cut, tensor_names
from exporter.gate.table import GateRow
from exporter.gate.whole import compare_blocks, compare_end_to_end, model_feeds, read_by
from exporter.onnx_files import save_onnx


@dataclass(frozen=True)
class Look:
    """`blocks`: before the blocks, every block and after them, given the reference's inputs; `inputs` of the layers in
    the blocks, in the graph's order; `end_to_end`: the output without help."""

    blocks: tuple[GateRow, ...]
    inputs: tuple[InputRow, ...]
    end_to_end: GateRow

    @property
    def right(self) -> bool:
        """Whether nothing deviates."""
        rows = [*self.blocks, self.end_to_end]
        return all(row.passed for row in rows) and all(row.passed for row in self.inputs)


def look_at(suspect: Suspect, model: onnx.ModelProto, folder: Path) -> Look:
    """Compare `model`, the suspect's or a changed one with the same tensors; files go to `folder`.

    Raises `CutError` and `FidelityError` as the gate does.
    """
    blocks, end_to_end = blocks_and_end(suspect, model, folder)
    inputs = [row for block in blocks if block.kind == "block" for row in _inputs(suspect, model, block, folder)]
    return Look(blocks, tuple(inputs), end_to_end)


def blocks_and_end(suspect: Suspect, model: onnx.ModelProto, folder: Path) -> tuple[tuple[GateRow, ...], GateRow]:
    """The rows of `model`'s blocks and what lies around them, given the reference's inputs, and that of its output."""
    reference, stage, optimized = suspect.reference, suspect.stage, suspect.optimized
    path = folder / "look.onnx"
    if suspect.segmented:
        *blocks, end_to_end = compare_segments(model, model, (), reference, stage, path, optimized=optimized).rows
        return tuple(blocks), end_to_end
    compared = compare_blocks(model, reference, stage, path, optimized=optimized)
    save_onnx(model, path)
    return compared, compare_end_to_end(path, reference, stage, optimized=optimized)


def _inputs(suspect: Suspect, model: onnx.ModelProto, block: GateRow, folder: Path) -> list[InputRow]:
    entries = entering(suspect.layers, block.name, suspect.reference)
    if not entries:
        return []
    wanted = [entry.input for entry in entries]
    outputs = run_between_boundaries(suspect, model, wanted, folder / "inputs.onnx")
    return input_rows(block, entries, suspect.reference, outputs)


def given_boundaries(suspect: Suspect, model: onnx.ModelProto) -> list[GivenTensor]:
    """The reference's boundaries that `model` has, as what it is cut at."""
    known = tensor_names(model)
    boundaries = suspect.reference.models[0].boundaries
    return [
        GivenTensor.like(name, np.asarray(array))
        for name, array in boundaries.items()
        if name != OUTPUT and name in known
    ]


def run_between_boundaries(suspect: Suspect, model: onnx.ModelProto, wanted: Sequence[str], path: Path) -> list[Arrays]:
    """These tensors, one mapping per timestep, all boundaries given; the cut graph goes to `path`."""
    graph = cut(model, given_boundaries(suspect, model), wanted)
    save_onnx(graph, path)
    feeds = [read_by(graph, feed) for feed in model_feeds(suspect.reference)]
    return run_graph(path, feeds, optimized=suspect.optimized)
