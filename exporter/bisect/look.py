"""One graph held against the reference: its blocks, what enters its layers, and its output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from exporter.bisect.suspect import Suspect
from exporter.gate.large import compare_segments
from exporter.gate.records import OUTPUT, LinearRecord
from exporter.gate.rows import chosen_rows
from exporter.gate.runs import Arrays, compare_snr, run_graph
from exporter.gate.subgraphs import GivenTensor, cut, tensor_names
from exporter.gate.table import GateRow, bounded_db
from exporter.gate.whole import compare_blocks, compare_end_to_end, model_feeds
from exporter.onnx_files import save_onnx

# Within a block a right graph drifts by the codes that flip at rounding boundaries, far less than this.
INPUT_DB = 30.0


@dataclass(frozen=True)
class InputRow:
    """What enters a quantized linear when its block is given the reference's inputs: its SNR, and how much is asked.

    Layers that read the same tensor have one row, under the first one's name.
    """

    block: str
    layer: str
    snr_db: float
    needed_db: float

    @property
    def passed(self) -> bool:
        """Whether it is as near to the reference as asked."""
        return self.snr_db >= self.needed_db


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
    """The rows of one block. Where the block as a whole deviates, its own limit is asked for."""
    inside = {
        entry.input: entry
        for entry in reversed(suspect.layers)
        if entry.layer.startswith(f"{block.name}.") and entry.input not in suspect.reference.models[0].boundaries
    }
    entries = [entry for entry in suspect.layers if inside.get(entry.input) is entry]
    if not entries:
        return []
    wanted = [entry.input for entry in entries]
    outputs = run_between_boundaries(suspect, model, wanted, folder / "inputs.onnx")
    records = {record.layer: record for record in suspect.reference.linears}
    needed = min(INPUT_DB, block.threshold_db) if block.passed else block.threshold_db
    return [
        InputRow(block.name, entry.layer, _snr(records[entry.layer], [one[entry.input] for one in outputs]), needed)
        for entry in entries
    ]


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
    read = {value.name for value in graph.graph.input}
    feeds = [{name: array for name, array in feed.items() if name in read} for feed in model_feeds(suspect.reference)]
    return run_graph(path, feeds, optimized=suspect.optimized)


def _snr(record: LinearRecord, arrays: Sequence[npt.NDArray[np.generic]]) -> float:
    """SNR on the token rows that the reference recorded, as many of each array; the lowest where rows do not match."""
    captured = record.x[: len(record.x) - record.probes]
    flat = [array.reshape(-1, array.shape[-1]) for array in arrays]
    rows = np.concatenate([array[chosen_rows(len(array), len(captured) // len(flat)).numpy()] for array in flat])
    return bounded_db(compare_snr([{record.layer: captured}], [{record.layer: rows}]).get(record.layer, np.nan))
