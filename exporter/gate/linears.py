"""Every quantized linear on the reference's own inputs: codes bit for bit, outputs where the codes agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from exporter.compute import COMPUTE_TYPES
from exporter.errors import FidelityError
from exporter.gate.codes import CodeComparison, compare_codes, encode_values
from exporter.gate.layer_rows import as_in_model, check_same_layers, layer_row
from exporter.gate.records import LinearRecord
from exporter.gate.runs import Arrays, compare_snr, run_graph
from exporter.gate.segments import Constants, DividedGraph, is_large
from exporter.gate.snr import power_ratio_db
from exporter.gate.subgraphs import GivenTensor, cut, given_name
from exporter.gate.table import GateRow, Stage, bounded_db
from exporter.onnx_files import save_onnx
from exporter.passes.layer_table import LayerEntry
from plugins.formats import get_format

LINEAR_DB = 100.0
# Per output channel, so that one wrong scale or weight among thousands cannot hide in the sum over channels.
CHANNEL_DB = 90.0


@dataclass(frozen=True)
class LinearsComparison:
    """Rows in graph order, the reference's outputs as the graph types them, and limits that differ from LINEAR_DB."""

    rows: tuple[GateRow, ...] = ()
    expected: Arrays = field(default_factory=dict)
    relaxed: Mapping[str, float] = field(default_factory=dict)

    def joined(self, other: LinearsComparison) -> LinearsComparison:
        """Both, with the rows of `other` behind."""
        return LinearsComparison(
            self.rows + other.rows, {**self.expected, **other.expected}, {**self.relaxed, **other.relaxed}
        )


def compare_linears(
    model: onnx.ModelProto,
    layers: Sequence[LayerEntry],
    records: Mapping[str, LinearRecord],
    stage: Stage,
    path: Path,
    *,
    optimized: bool,
) -> LinearsComparison:
    """Cut `model` at every linear, write the cut graph to `path`, run it on the records' inputs and compare.

    A large graph is run a few layers at a time, and nothing is written.

    Raises:
        FidelityError: the graph has other layers than the records, or cannot be run.
    """
    feeds = linear_feeds(layers, records, stage)
    if is_large(layers):
        found = _run_few_at_a_time(model, layers, feeds, path, optimized=optimized)
    else:
        save_onnx(cut_at_linears(model, layers, feeds), path)
        (found,) = run_graph(path, [feeds], optimized=optimized)
    return judge_linears(layers, records, found, stage)


def judge_linears(
    layers: Sequence[LayerEntry],
    records: Mapping[str, LinearRecord],
    found: Arrays,
    stage: Stage,
    codes: dict[str, CodeComparison] | None = None,
) -> LinearsComparison:
    """Compare what the linears' outputs and quantized inputs were `found` to be on the records' inputs.

    `codes`, by the names of quantized inputs, are those that earlier layers have counted already; those of these layers
    are added.

    Raises:
        FidelityError: quantized inputs are none of their formats.
    """
    codes = {} if codes is None else codes
    counted: dict[str, CodeComparison] = {}
    for entry in layers:
        if entry.values and entry.values not in codes:
            counted[entry.layer] = codes[entry.values] = _codes(records[entry.layer], entry, found)
    expected: Arrays = {
        entry.output: as_in_model(records[entry.layer].y, records[entry.layer].rank) for entry in layers
    }
    kept = {entry.output: codes[entry.values].rows_agree for entry in layers if entry.values}
    snr = compare_snr([expected], [found], kept)
    rows = [
        _row(
            records[entry.layer],
            found[entry.output],
            snr.get(entry.output, np.nan),
            kept.get(entry.output),
            counted.get(entry.layer),
            stage,
        )
        for entry in layers
    ]
    flipped = [name for name, rows_agree in kept.items() if not rows_agree.all()]
    unmasked = compare_snr([expected], [found]) if flipped else {}
    limits = {entry.output: _limit_db(records[entry.layer]) for entry in layers}
    relaxed = {name: limit for name, limit in limits.items() if limit < LINEAR_DB}
    # polygraphy compares whole tensors: where a code legitimately flipped, what the flip leaves is its limit.
    relaxed |= {name: float(np.floor(bounded_db(unmasked[name]))) for name in flipped}
    return LinearsComparison(tuple(rows), {**expected, **_expected_values(layers, records, found)}, relaxed)


def cut_at_linears(model: onnx.ModelProto, layers: Sequence[LayerEntry], feeds: Arrays) -> onnx.ModelProto:
    """The graph of these linears, every one of which reads its own input."""
    given = given_to_linears(layers, feeds)
    return cut(model, [GivenTensor.like(name, array) for name, array in given.items()], linear_outputs(layers))


def given_to_linears(layers: Sequence[LayerEntry], feeds: Arrays) -> Arrays:
    """The linears' inputs by their names in the graph that is cut."""
    return {entry.input: feeds[given_name(entry.input)] for entry in layers}


def linear_outputs(layers: Sequence[LayerEntry]) -> list[str]:
    """What is compared: the linears' quantized inputs and their outputs."""
    return list(dict.fromkeys(name for entry in layers for name in (entry.values, entry.output) if name))


def run_linears(
    graph: DividedGraph, layers: Sequence[LayerEntry], feeds: Arrays, known: Constants, path: Path, *, optimized: bool
) -> Arrays:
    """What these linears of a large graph, of which some constants are `known`, give on their own `feeds`."""
    part = graph.part(given_to_linears(layers, feeds), linear_outputs(layers), known)
    own = {value.name: feeds[value.name] for value in part.model.graph.input}
    return run_graph(path, [own], optimized=optimized, part=part)[0]


def _run_few_at_a_time(
    model: onnx.ModelProto, layers: Sequence[LayerEntry], feeds: Arrays, path: Path, *, optimized: bool
) -> Arrays:
    graph = DividedGraph(model)
    found: Arrays = {}
    for some in _few_at_a_time(layers):
        found |= run_linears(graph, some, feeds, {}, path, optimized=optimized)
    return found


def _few_at_a_time(layers: Sequence[LayerEntry]) -> Iterator[list[LayerEntry]]:
    """Neighbouring layers of up to LARGEST_WHOLE weights, or one alone."""
    some: list[LayerEntry] = []
    for entry in layers:
        if some and is_large([*some, entry]):
            yield some
            some = []
        some.append(entry)
    yield some


def linear_feeds(layers: Sequence[LayerEntry], records: Mapping[str, LinearRecord], stage: Stage) -> Arrays:
    """The cut graph's inputs; where layers share a quantizer, the first layer's record is the input.

    Raises:
        FidelityError: the graph has other layers than the records.
    """
    check_same_layers(
        {entry.layer for entry in layers},
        records,
        stage,
        missing="the quantized linear {} is missing",
        unknown="{} is quantized here but not in the reference",
    )
    feeds: Arrays = {}
    for entry in layers:
        record = records[entry.layer]
        feeds.setdefault(given_name(entry.input), as_in_model(record.x, record.rank))
    return feeds


def _codes(record: LinearRecord, entry: LayerEntry, found: Arrays) -> CodeComparison:
    if record.values is None or record.scales is None:
        raise FidelityError(f"{record.layer}: the graph quantizes its input, the reference does not")
    raw = found[entry.values]
    if raw.size != record.values.size:
        raise FidelityError(f"{record.layer}: {raw.size} quantized activations, the reference has {record.values.size}")
    try:
        values = entry.decode_values(raw).reshape(record.values.shape)
    except ValueError as error:
        raise FidelityError(f"{record.layer}: quantized activations: {error}") from error
    return compare_codes(record.x, record.scales, record.values, values, get_format(record.activation_format))


def _expected_values(layers: Sequence[LayerEntry], records: Mapping[str, LinearRecord], found: Arrays) -> Arrays:
    expected: Arrays = {}
    for entry in layers:
        values = records[entry.layer].values
        if entry.values and values is not None:
            raw = encode_values(values, get_format(entry.activation_format), entry.encoding)
            expected.setdefault(entry.values, raw.reshape(found[entry.values].shape))
    return expected


def _row(
    record: LinearRecord,
    found: npt.NDArray[np.generic],
    snr: float,
    rows_agree: npt.NDArray[np.bool_] | None,
    codes: CodeComparison | None,
    stage: Stage,
) -> GateRow:
    """`codes` is None for a weight-only layer, and where an earlier layer's row counts them."""
    kept = np.ones(len(record.x), dtype=np.bool_) if rows_agree is None else rows_agree
    failures, limit = [], _limit_db(record)
    if not snr >= limit:
        failures.append(f"output SNR {bounded_db(snr):.1f} dB, at least {limit:.0f} dB needed")
    if found.size == record.y.size:
        failures.append(_channel_failure(record, found.reshape(record.y.shape).astype(np.float64), kept))
    return layer_row(stage, "linear", record.layer, snr, limit, codes, failures)


def _channel_db(record: LinearRecord) -> float:
    """CHANNEL_DB, or what rounding every product by as much as its type allows would leave."""
    return min(CHANNEL_DB, float(np.floor(-20 * np.log10(COMPUTE_TYPES[record.products].relative_error))))


def _limit_db(record: LinearRecord) -> float:
    """LINEAR_DB, or what rounding every product by as much as its type allows would leave of the output with bias."""
    if record.products == "fp32":
        return LINEAR_DB
    output, product = (
        float(np.mean(np.square(array, dtype=np.float64))) for array in (record.y, record.y - record.bias)
    )
    return min(LINEAR_DB, _channel_db(record) + bounded_db(power_ratio_db(output, product)))


def _channel_failure(record: LinearRecord, found: npt.NDArray[np.float64], kept: npt.NDArray[np.bool_]) -> str:
    """Which output channels deviate by more than `_channel_db` below their own signal (the bias is none) and by more
    than float32 itself would lose; captured rows and probes each on their own."""
    captured = len(record.x) - record.probes
    limit = _channel_db(record)
    deviates = np.zeros(found.shape[1], dtype=np.bool_)
    worst = np.inf
    for part, floor in zip((slice(captured), slice(captured, None)), record.noise_floor, strict=True):
        rows = kept[part]
        if not rows.any():
            continue
        expected = record.y[part][rows].astype(np.float64)
        noise = np.sqrt(np.mean((found[part][rows] - expected) ** 2, axis=0))
        signal = np.sqrt(np.mean((expected - record.bias) ** 2, axis=0))
        over = ~(noise <= np.maximum(signal * 10 ** (-limit / 20), floor))
        deviates |= over
        if over.any():
            with np.errstate(divide="ignore", invalid="ignore"):
                worst = min(worst, float(np.min(20 * np.log10(signal[over] / noise[over]))))
    if not deviates.any():
        return ""
    channels = np.flatnonzero(deviates)
    which = f"output channel {channels[0]}" if len(channels) == 1 else f"{len(channels)} channels from {channels[0]} on"
    return f"{which}, of {len(deviates)}, down to {bounded_db(worst):.1f} dB, at least {limit:.0f} dB needed"
