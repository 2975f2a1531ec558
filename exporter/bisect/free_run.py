"""The graph running free on the reference's inputs: the first boundary at which it has left the reference.

One run with every boundary as an output costs the memory of one timestep's boundaries and no run more than the model
itself; where that is more than there is, the boundaries are halved, one output at a time, log2(blocks) runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporter.bisect.suspect import Suspect
from exporter.gate.records import OUTPUT
from exporter.gate.runs import Arrays, compare_snr, run_graph
from exporter.gate.segments import DividedGraph, segment_outputs, with_constants
from exporter.gate.subgraphs import cut, given_name
from exporter.gate.table import bounded_db
from exporter.gate.whole import read_by
from exporter.onnx_files import save_onnx

# Outputs may take this part of the memory that is free: the graph's own tensors need some, too.
_SHARE_OF_MEMORY = 0.25


@dataclass(frozen=True)
class FreeRow:
    """One boundary of the free-running graph: its SNR against the reference, the worst timestep's."""

    name: str
    snr_db: float


@dataclass(frozen=True)
class FreeRun:
    """The boundaries that were looked at, in order, and the first that is below `limit_db`; "" where none is.

    `how` says in words how many runs it took and why.
    """

    rows: tuple[FreeRow, ...]
    limit_db: float
    first: str
    how: str


def run_free(suspect: Suspect, folder: Path, available: int | None = None) -> FreeRun:
    """Run the graph without any help; files go to `folder`. `available` bytes of memory: those that are free now.

    Every boundary is held to what the end of the net must reach, since a right net only drifts on its way.
    """
    names = [*(f"{block}.output" for block in suspect.reference.blocks), OUTPUT]
    limit = suspect.reference.end_to_end_threshold
    if suspect.segmented:
        return judged(
            _measure_segments(suspect, names, folder), limit, f"in segments, with all {len(names)} boundaries"
        )
    needed = sum(np.asarray(suspect.reference.models[0].boundaries[name]).nbytes for name in names)
    budget = int((free_memory() if available is None else available) * _SHARE_OF_MEMORY)
    size = f"{needed / 1e6:.1f} MB a timestep"
    if needed <= budget:
        rows = _measure(suspect, names, folder)
        return judged(rows, limit, f"one run with all {len(names)} boundaries as outputs ({size})")
    seen: dict[str, FreeRow] = {}

    def leaves(index: int) -> bool:
        (seen[names[index]],) = _measure(suspect, [names[index]], folder)
        return not seen[names[index]].snr_db >= limit

    index = first_true(leaves, len(names))
    rows = tuple(seen[name] for name in names if name in seen)
    how = f"{len(seen)} runs with one boundary each, halving: all {len(names)} together take {size}"
    return FreeRun(rows, limit, "" if index == len(names) else names[index], how)


def judged(rows: tuple[FreeRow, ...], limit: float, how: str) -> FreeRun:
    """The verdict on all boundaries."""
    return FreeRun(rows, limit, next((row.name for row in rows if not row.snr_db >= limit), ""), how)


def first_true(test: Callable[[int], bool], count: int) -> int:
    """The smallest index below `count` for which `test` holds, if it holds for all that follow; else `count`."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if test(middle):
            high = middle
        else:
            low = middle + 1
    return low


def free_memory() -> int:
    """Bytes of memory that nothing uses."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _measure(suspect: Suspect, names: Sequence[str], folder: Path) -> tuple[FreeRow, ...]:
    """SNR of these boundaries; one timestep is held at a time."""
    path = folder / "free.onnx"
    save_onnx(cut(suspect.model, [], names), path)
    worst = dict.fromkeys(names, np.inf)
    for model in suspect.reference.models:
        expected: Arrays = {name: np.asarray(model.boundaries[name]) for name in names}
        outputs = run_graph(path, [dict(model.inputs)], optimized=suspect.optimized)
        found = compare_snr([expected], outputs)
        worst = {name: float(np.minimum(worst[name], found.get(name, np.nan))) for name in names}
    return tuple(FreeRow(name, bounded_db(worst[name])) for name in names)


def _measure_segments(suspect: Suspect, names: Sequence[str], folder: Path) -> tuple[FreeRow, ...]:
    """The same of a large graph, whose segments take what those before them gave."""
    models = suspect.reference.models
    free: list[Arrays] = [dict(model.inputs) for model in models]
    example: Arrays = {}
    rows: list[FreeRow] = []
    graph = DividedGraph(suspect.model)
    segments = segment_outputs(suspect.model, suspect.reference.blocks)
    for wanted, constants in with_constants(graph, segments):
        part = graph.part(example, wanted, constants)
        feeds = [read_by(part.model, feed) for feed in free]
        outputs = run_graph(folder / "free.onnx", feeds, optimized=suspect.optimized, part=part)
        for feed, output in zip(free, outputs, strict=True):
            feed.update({given_name(name): array for name, array in output.items()})
        example |= outputs[0]
        compared = [name for name in wanted if name in names]
        expected = [{name: np.asarray(model.boundaries[name]) for name in compared} for model in models]
        found = compare_snr(expected, outputs)
        rows += [FreeRow(name, bounded_db(found.get(name, np.nan))) for name in compared]
    return tuple(rows)
