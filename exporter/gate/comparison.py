"""Graphs against the reference: every row, and the commands that repeat the comparisons."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import onnx
import torch

from exporter.device.acceptance import INPUTS, OUTPUTS
from exporter.errors import FidelityError
from exporter.files import atomic_path
from exporter.gate.large import compare_segments
from exporter.gate.linears import (
    LINEAR_DB,
    LinearsComparison,
    compare_linears,
    cut_at_linears,
    linear_feeds,
)
from exporter.gate.outputs import compare_outputs
from exporter.gate.records import LinearRecord, Reference
from exporter.gate.reference import EXACT_DB
from exporter.gate.runs import quiet, repeat_command, save_feeds, save_reference
from exporter.gate.segments import is_large
from exporter.gate.subgraphs import CutError
from exporter.gate.table import GateResult, GateRow, Stage
from exporter.gate.tiles import compare_tiles
from exporter.gate.whole import block_thresholds, compare_blocks, compare_end_to_end, cut_between_blocks
from exporter.onnx_files import LARGEST_WORK_FILE_BYTES, read_model, save_onnx
from exporter.passes.layer_table import LayerEntry, read_layer_table, read_output_table
from exporter.passes.tiling import untiled
from exporter.progress import Progress
from exporter.runtime.arena import renew_arena
from exporter.targets import Target


def compare_graph(
    path: Path, stage: Stage, reference: Reference, folder: Path, target: Target, progress: Progress
) -> GateResult:
    """All rows of the graph in `path`, and the commands that repeat them, with their files in `folder`, the cut graphs
    of a large one beside it, if `folder` is.

    A large exported graph gets no commands, and none of the files that they would need, hundreds of megabytes.

    Raises:
        FidelityError: the graph lacks a tensor at which it is cut, has other layers than the reference, or cannot run.
    """
    compared = _Compared.open(path, stage, reference, folder, target)
    with progress.task(f"comparing the {stage} graph", compared.steps) as task:
        result = compared.result(task.advance)
    renew_arena()
    return result


def compare_graphs(
    exported: Path, lowered: Path, reference: Reference, folder: Path, target: Target, progress: Progress
) -> GateResult:
    """What `compare_graph` finds of both, the exported one's rows first; the commands are the lowered one's, of a large
    one the end to end's alone: files for the others would take hundreds of megabytes, and a tenth of the time.

    Large graphs are compared side by side, on half of torch's threads each; a small one's sessions take all cores.
    Raises `FidelityError` as `compare_graph` does.
    """
    threads = max(1, torch.get_num_threads() // 2)
    both = [
        _Compared.open(exported, "exported", reference, folder, target, threads=threads),
        _Compared.open(lowered, "lowered", reference, folder, target, threads=threads, briefly=True),
    ]
    ended = Event()
    with progress.task("comparing the graphs", sum(graph.steps for graph in both)) as task, quiet():

        def advance() -> None:
            if ended.is_set():
                raise InterruptedError("the comparison of the other graph has failed, or all of it was interrupted")
            task.advance()

        with ThreadPoolExecutor(len(both) if all(graph.is_large for graph in both) else 1) as pool:
            running = [pool.submit(graph.result, advance) for graph in both]
            try:
                first, second = (future.result() for future in running)
            finally:
                # Else an interrupted export would wait for the end of both.
                ended.set()
                running[-1].cancel()
    renew_arena()
    return GateResult(first.rows + second.rows, second.commands)


@dataclass(frozen=True)
class _Compared:
    """One graph as its file has it (`written`) and without tiles (`plain`), and where its cuts are kept."""

    path: Path
    written: onnx.ModelProto
    plain: onnx.ModelProto
    stage: Stage
    reference: Reference
    folder: Path
    optimized: bool
    threads: int | None
    briefly: bool

    @classmethod
    def open(
        cls,
        path: Path,
        stage: Stage,
        reference: Reference,
        folder: Path,
        target: Target,
        *,
        threads: int | None = None,
        briefly: bool = False,
    ) -> _Compared:
        """Read the graph, a large one without the weights that are in a file of their own; its operators get so many
        `threads`. `briefly` leaves out a large graph's commands but for the end to end's."""
        written = read_model(path, external_data=False)
        if not is_large(read_layer_table(written)):
            written = read_model(path)
        optimized = stage == "exported" or target.engine == "onnxruntime"
        plain, reference = untiled(written), reference.for_stage(stage)
        return cls(path, written, plain, stage, reference, folder, optimized, threads, briefly)

    @property
    def steps(self) -> int:
        """How often a comparison reports that it is farther."""
        return len(self.reference.blocks) + 2 if self.is_large else 3

    def result(self, advance: Callable[[], None]) -> GateResult:
        """All rows and the commands. Raises `FidelityError` as `compare_graph` does."""
        try:
            linears, rest = self.in_segments(advance) if self.is_large else self.whole(advance)
            outputs = self.outputs()
            commands = self.repeat_commands(linears)
        except CutError as error:
            raise FidelityError(f"{self.path}: {error}") from error
        return GateResult((*linears.rows, *outputs, *rest), commands)

    @property
    def is_large(self) -> bool:
        """Whether the graph is run in segments."""
        return is_large(self.layers)

    @property
    def layers(self) -> tuple[LayerEntry, ...]:
        """The quantized linears."""
        return read_layer_table(self.plain)

    @property
    def records(self) -> dict[str, LinearRecord]:
        """What the reference has of each linear."""
        return {record.layer: record for record in self.reference.linears}

    def cut_path(self, kind: str) -> Path:
        """The file of the graph that is cut at its `linears` or between its `blocks`."""
        if self.lends_weights:
            return self.path.with_name(f"{self.path.stem}.{kind}.onnx")
        return self.folder / f"{kind}.{self.stage}.onnx"

    @property
    def lends_weights(self) -> bool:
        """Whether the cut graphs read the weights in the large graph's second file: in the work folder they stand
        beside it."""
        return self.is_large and self.path.parent == self.folder.parent

    def save_cut(self, cut: onnx.ModelProto, path: Path) -> None:
        """Write a part of the large graph, some of whose weights are in the graph's own second file."""
        if self.lends_weights:
            with atomic_path(path) as temporary:
                onnx.save(cut, temporary)
        else:
            save_onnx(cut, path, LARGEST_WORK_FILE_BYTES, folder=self.path.parent)

    def whole(self, advance: Callable[[], None]) -> tuple[LinearsComparison, tuple[GateRow, ...]]:
        """Compare a small graph, in one piece each time; the second part is the blocks, tiles and the end to end."""
        reference, stage, optimized = self.reference, self.stage, self.optimized
        cut = self.cut_path("linears")
        linears = compare_linears(self.plain, self.layers, self.records, stage, cut, optimized=optimized)
        advance()
        cut = self.cut_path("blocks")
        blocks = compare_blocks(self.plain, reference, stage, cut, optimized=optimized, layers=self.layers)
        advance()
        tiles: tuple[GateRow, ...] = ()
        if self.plain is not self.written:
            tiles = (compare_tiles(self.path, self.plain, reference, stage, self.cut_path("whole")),)
        end = compare_end_to_end(self.path, reference, stage, optimized=optimized)
        advance()
        return linears, (*blocks, *tiles, end)

    def outputs(self) -> tuple[GateRow, ...]:
        """Compare the quantizers of layers' outputs, which no command repeats."""
        entries, records = read_output_table(self.plain), self.reference.outputs
        cut, folder = self.cut_path("outputs"), self.path.parent
        return compare_outputs(self.plain, entries, records, self.stage, cut, optimized=self.optimized, folder=folder)

    def in_segments(self, advance: Callable[[], None]) -> tuple[LinearsComparison, tuple[GateRow, ...]]:
        """The same of a large graph, segment by segment."""
        found = compare_segments(
            self.written,
            self.plain,
            self.layers,
            self.reference,
            self.stage,
            self.path,
            optimized=self.optimized,
            advance=advance,
            threads=self.threads,
        )
        return found.linears, found.rows

    def repeat_commands(self, linears: LinearsComparison) -> tuple[str, ...]:
        """The commands, whose files are written."""
        if self.is_large and self.stage == "exported":
            return ()
        if self.is_large and self.briefly:
            return (self.end_command(),)
        linears_path, blocks_path = self.cut_path("linears"), self.cut_path("blocks")
        inputs, outputs = (self.folder / f"linears.{self.stage}.{what}.json" for what in ("inputs", "reference"))
        feeds = linear_feeds(self.layers, self.records, self.stage)
        if self.is_large:
            self.save_cut(cut_at_linears(self.plain, self.layers, feeds), linears_path)
            self.save_cut(cut_between_blocks(self.plain, self.reference), blocks_path)
        save_feeds([feeds], inputs)
        save_reference([linears.expected], outputs)
        thresholds = block_thresholds(self.plain, self.reference)
        limits = {name: limit for name, limit in thresholds.items() if limit != EXACT_DB}
        optimized = self.optimized
        return (
            repeat_command(linears_path, inputs, outputs, linears.relaxed, default_db=LINEAR_DB, optimized=optimized),
            repeat_command(blocks_path, *self.model_files, limits, default_db=EXACT_DB, optimized=optimized),
            self.end_command(),
        )

    def end_command(self) -> str:
        """The command that runs the whole graph."""
        end = self.reference.end_to_end_threshold
        return repeat_command(self.path, *self.model_files, {}, default_db=end, optimized=self.optimized)

    @property
    def model_files(self) -> tuple[Path, Path]:
        """Polygraphy's files of the whole model, and where they have the boundaries, too, of its blocks."""
        return self.folder / INPUTS, self.folder / OUTPUTS
