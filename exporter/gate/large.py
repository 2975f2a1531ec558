"""A large graph in one walk over its segments: linears, blocks, tiles and the end to end, each weight expanded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from exporter.errors import FidelityError
from exporter.gate.codes import CodeComparison
from exporter.gate.linears import LinearsComparison, judge_linears, linear_feeds, run_linears
from exporter.gate.records import OUTPUT, Reference
from exporter.gate.runs import Arrays, run_graph
from exporter.gate.segments import Constants, DividedGraph, segment_outputs, with_constants
from exporter.gate.subgraphs import given_name
from exporter.gate.table import GateRow, Stage
from exporter.gate.whole import boundary_rows, computed_boundaries, end_to_end_row, model_feeds, read_by, tiles_row
from exporter.memory import release_mapped_weights
from exporter.passes.layer_table import LayerEntry


@dataclass(frozen=True)
class SegmentsComparison:
    """The rows of the blocks, the tiles (where there are any) and the end to end, and the linears'."""

    rows: tuple[GateRow, ...]
    linears: LinearsComparison


def compare_segments(
    written: onnx.ModelProto,
    plain: onnx.ModelProto,
    layers: Sequence[LayerEntry],
    reference: Reference,
    stage: Stage,
    path: Path,
    *,
    optimized: bool,
    advance: Callable[[], None] = lambda: None,
    threads: int | None = None,
) -> SegmentsComparison:
    """What `compare_blocks`, `compare_tiles` and `compare_end_to_end` compare, of a large graph and segment by segment.

    Every segment of `plain`, the graph without tiles, runs on the reference's tensors, and on what the segments of
    `written` before it gave, which run free from the model's inputs to its output (`Reference.free_inputs`); there a
    tiled segment must give the bits of the plain one. Those of the `layers` that lie in it run on the inputs that the
    reference recorded. `path`, the graph's file, is for messages and for weights that the graphs lack; `threads` are
    those of one operator.

    Raises:
        CutError: the graph lacks a block's output.
        FidelityError: it cannot be run, or has other layers than the reference.
        InputError: a weight's values cannot be read from their file.
    """
    walk = _Walk(written, plain, layers, reference, stage, path, optimized, threads)
    for names, constants in with_constants(walk.graph, segment_outputs(plain, reference.blocks)):
        walk.through(names, constants)
        advance()
    return walk.result()


class _Walk:
    """Goes from segment to segment of `graph`, the plain one, with what the ones before gave."""

    def __init__(
        self,
        written: onnx.ModelProto,
        plain: onnx.ModelProto,
        layers: Sequence[LayerEntry],
        reference: Reference,
        stage: Stage,
        path: Path,
        optimized: bool,
        threads: int | None,
    ) -> None:
        self.graph = DividedGraph(plain, threads=threads, folder=path.parent)
        self._tiled = None if written is plain else DividedGraph(written, threads=threads, folder=path.parent)
        self._reference, self._stage, self._path, self._optimized = reference, stage, path, optimized
        self._boundaries = computed_boundaries(plain, reference)
        self._layers = list(layers)
        self._records = {record.layer: record for record in reference.linears}
        self._linear_feeds = linear_feeds(layers, self._records, stage) if layers else {}
        self._linears = LinearsComparison()
        self._codes: dict[str, CodeComparison] = {}
        self._forced = model_feeds(reference)
        self._free: list[Arrays] = [reference.free_inputs(model) for model in reference.models]
        self._example: Arrays = {}
        self._rows: list[GateRow] = []
        self._tiles_equal: list[bool] = []

    def through(self, names: Sequence[str], constants: Constants) -> None:
        """Compare the segment that computes `names`, given its constants."""
        self._run_linears(names, constants)
        count = len(self._forced)
        outputs = self._run(self.graph, names, constants, [*self._forced, *self._free])
        given, free = outputs[:count], outputs[count:]
        compared = [name for name in self._boundaries if name in names]
        self._rows += boundary_rows(compared, self._reference, given, self._stage)
        if self._tiled is not None:
            tiled = self._run(self._tiled, names, constants, self._free)
            self._tiles_equal += [
                np.array_equal(a[name], b[name]) for a, b in zip(free, tiled, strict=True) for name in a
            ]
            free = tiled
        for feed, output in zip(self._free, free, strict=True):
            feed.update({given_name(name): array for name, array in output.items()})
        self._example |= free[0]
        # What was read of the reference's file.
        release_mapped_weights()

    def _run(
        self, graph: DividedGraph, names: Sequence[str], constants: Constants, feeds: Sequence[Arrays]
    ) -> list[Arrays]:
        part = graph.part(self._example, names, constants)
        read = [read_by(part.model, feed) for feed in feeds]
        return run_graph(self._path, read, optimized=self._optimized, part=part)

    def _run_linears(self, names: Sequence[str], constants: Constants) -> None:
        """Compare the layers that no segment before this one had: what all of them give would be kept until the end."""
        outputs = [entry.output for entry in self._layers]
        here = self.graph.computes(self._example, names, outputs)
        inside = [entry for entry in self._layers if entry.output in here]
        self._layers = [entry for entry in self._layers if entry.output not in here]
        if inside:
            found = run_linears(
                self.graph, inside, self._linear_feeds, constants, self._path, optimized=self._optimized
            )
            self._linears = self._linears.joined(judge_linears(inside, self._records, found, self._stage, self._codes))

    def result(self) -> SegmentsComparison:
        """All rows, after the last segment. Raises `FidelityError` where a layer was in none."""
        if self._layers:
            raise FidelityError(f"{self._path}: {self._layers[0].layer} does not lead to the model's output")
        ends = [{OUTPUT: feed[given_name(OUTPUT)]} for feed in self._free]
        end = end_to_end_row(ends, self._reference, self._stage)
        tiles = (tiles_row(self._stage, equal=all(self._tiles_equal)),) if self._tiles_equal else ()
        return SegmentsComparison((*self._rows, *tiles, end), self._linears)
