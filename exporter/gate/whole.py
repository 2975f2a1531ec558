"""Blocks, and what lies before and after them, on the reference's own inputs; and the model running free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from exporter.device.acceptance import INPUTS, OUTPUTS
from exporter.gate.entering import entering, input_rows, judged_by_inputs
from exporter.gate.records import OUTPUT, Reference
from exporter.gate.runs import Arrays, compare_snr, run_graph, save_feeds, save_reference
from exporter.gate.subgraphs import GivenTensor, cut, given_name, tensor_names
from exporter.gate.table import SNR_CEILING_DB, GateRow, Kind, Stage, bounded_db
from exporter.onnx_files import save_onnx
from exporter.passes.layer_table import LayerEntry


def compare_blocks(
    model: onnx.ModelProto,
    reference: Reference,
    stage: Stage,
    path: Path,
    *,
    optimized: bool,
    layers: Sequence[LayerEntry] = (),
) -> tuple[GateRow, ...]:
    """Cut `model` between the blocks, write the cut graph to `path`, run it and compare every boundary.

    Every block, and the tail, reads the reference's tensors; so each row is about one block alone. It fails as well
    where what enters one of the `layers` in the block deviates, which the block's output may hide.

    Raises:
        CutError: the graph lacks a block's output.
        FidelityError: it cannot be run.
    """
    entries = {block: entering(layers, block, reference) for block in reference.blocks}
    read = [entry.input for inside in entries.values() for entry in inside]
    graph = cut_between_blocks(model, reference, read)
    save_onnx(graph, path)
    outputs = run_graph(path, [read_by(graph, feed) for feed in model_feeds(reference)], optimized=optimized)
    if read:
        # The commands that repeat the comparison know the boundaries alone.
        save_onnx(cut_between_blocks(model, reference), path)
    rows = boundary_rows(computed_boundaries(model, reference), reference, outputs, stage)
    return tuple(judged_by_inputs(row, input_rows(row, entries.get(row.name, ()), reference, outputs)) for row in rows)


def cut_between_blocks(model: onnx.ModelProto, reference: Reference, more: Sequence[str] = ()) -> onnx.ModelProto:
    """The graph whose every block, and the tail, reads the reference's tensors; tensors in `more` are outputs, too.

    Raises `CutError`.
    """
    names = computed_boundaries(model, reference)
    example = reference.models[0].boundaries
    given = [GivenTensor.like(name, np.asarray(example[name])) for name in names if name != OUTPUT]
    return cut(model, given, [*names, *more])


def boundary_rows(
    names: Sequence[str], reference: Reference, outputs: Sequence[Arrays], stage: Stage
) -> tuple[GateRow, ...]:
    """The verdict on what blocks, stem and tail give when the reference's tensors are given, one mapping a timestep."""
    expected = [{name: model.boundaries[name] for name in names} for model in reference.models]
    snr = compare_snr(expected, outputs)
    return tuple(
        _row(stage, _kind(name, reference.blocks), name, snr.get(name, np.nan), reference.thresholds[name])
        for name in names
    )


def read_by(graph: onnx.ModelProto, feed: Arrays) -> Arrays:
    """What of `feed` the graph reads."""
    return {value.name: feed[value.name] for value in graph.graph.input if value.name in feed}


def tiles_row(stage: Stage, *, equal: bool) -> GateRow:
    """The verdict on a tiled graph that must give the bits of the same graph without tiles."""
    snr = SNR_CEILING_DB if equal else -SNR_CEILING_DB
    detail = "" if equal else "the tiled graph computes other bits than the same graph without its tiles"
    return GateRow(stage, "tiles", OUTPUT, snr, SNR_CEILING_DB, passed=equal, detail=detail)


def compare_end_to_end(path: Path, reference: Reference, stage: Stage, *, optimized: bool) -> GateRow:
    """Run the ONNX file as it is on the captured inputs and compare its output.

    Raises:
        FidelityError: it cannot be run.
    """
    outputs = run_graph(path, [reference.free_inputs(model) for model in reference.models], optimized=optimized)
    return end_to_end_row(outputs, reference, stage)


def end_to_end_row(outputs: Sequence[Arrays], reference: Reference, stage: Stage) -> GateRow:
    """The verdict on the outputs of the graph running free, one mapping a timestep."""
    expected: Sequence[Arrays] = [{OUTPUT: reference.free_output(model)} for model in reference.models]
    snr = compare_snr(expected, outputs)
    return _row(stage, "end_to_end", OUTPUT, snr.get(OUTPUT, np.nan), reference.end_to_end_threshold)


def model_feeds(reference: Reference) -> list[Arrays]:
    """Per timestep the model's inputs and, under the names of a cut graph's inputs, every boundary."""
    return [
        {
            **model.inputs,
            **{given_name(name): array for name, array in reference.given(model).items() if name != OUTPUT},
        }
        for model in reference.models
    ]


def save_runs(reference: Reference, folder: Path, *, boundaries: bool) -> None:
    """Write, for polygraphy, the inputs and the output of the whole model; with all `boundaries` they are those of the
    graph that is cut between its blocks, too."""
    feeds = model_feeds(reference) if boundaries else [dict(model.inputs) for model in reference.models]
    save_feeds(feeds, folder / INPUTS)
    names = list(reference.models[0].boundaries) if boundaries else [OUTPUT]
    save_reference([{name: model.boundaries[name] for name in names} for model in reference.models], folder / OUTPUTS)


def block_thresholds(model: onnx.ModelProto, reference: Reference) -> Mapping[str, float]:
    """Least SNR in dB of every output of the cut graph."""
    return {name: reference.thresholds[name] for name in computed_boundaries(model, reference)}


def computed_boundaries(model: onnx.ModelProto, reference: Reference) -> list[str]:
    """The boundaries that the graph computes, in the reference's order; block outputs may not be missing.

    A tensor that enters the blocks as the model's own input needs no comparison, and one that no block reads may
    have been dropped.
    """
    inputs = {value.name for value in model.graph.input}
    passed_on = {node.output[0] for node in model.graph.node if node.op_type == "Identity" and node.input[0] in inputs}
    known = tensor_names(model) - inputs - passed_on
    required = {OUTPUT, *(f"{block}.output" for block in reference.blocks)}
    return [name for name in reference.thresholds if name in known or name in required]


def _kind(name: str, blocks: Sequence[str]) -> Kind:
    if name == OUTPUT:
        return "tail"
    return "block" if name in {f"{block}.output" for block in blocks} else "stem"


def _row(stage: Stage, kind: Kind, name: str, snr: float, threshold: float) -> GateRow:
    name = name.removesuffix(".output") if kind == "block" else name
    return GateRow(stage, kind, name, bounded_db(snr), threshold, passed=bool(snr >= threshold))
