"""Outputs of layers that are quantized: recorded of the torch model, and compared on the same numbers bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from exporter.compute import Compute
from exporter.errors import FidelityError
from exporter.gate.codes import compare_codes
from exporter.gate.layer_rows import as_in_model, check_same_layers, layer_row
from exporter.gate.linears import LINEAR_DB
from exporter.gate.records import OutputRecord
from exporter.gate.rows import TokenRows, as_array
from exporter.gate.runs import Arrays, compare_snr, run_graph
from exporter.gate.subgraphs import GivenTensor, cut, given_name
from exporter.gate.table import GateRow, Stage, bounded_db
from exporter.onnx_files import save_onnx
from exporter.output_quantizer import OutputQuantizer
from exporter.passes.layer_table import OutputEntry
from plugins.formats import get_format

# Tokens of each output that are compared: a quantizer has no weights that only some of them would show.
TOKEN_ROWS = 64


@dataclass(frozen=True)
class LayerOutputs:
    """Token rows of what every `OutputQuantizer` reads."""

    modules: Mapping[str, OutputQuantizer]
    seen: TokenRows

    @classmethod
    def of(cls, model: nn.Module, batches: int, compute: Compute = "fp32") -> LayerOutputs:
        """For `model`, which is going to run `batches` times; the rows are rounded to `compute`."""
        modules = {module.layer: module for module in model.modules() if isinstance(module, OutputQuantizer)}
        return cls(modules, TokenRows(modules, max(1, TOKEN_ROWS // batches), compute))

    def collected(self) -> AbstractContextManager[None]:
        """Collect while the model runs once."""
        return self.seen.collected()

    def records(self) -> Iterator[OutputRecord]:
        """One record per output, in the order in which they were first made."""
        for layer, rows in self.seen.rows.items():
            module, x = self.modules[layer], torch.cat(rows)
            values, scales = map(as_array, module.quantize(x))
            yield OutputRecord(layer, module.format, self.seen.ranks[layer], as_array(x), values, scales)


def compare_outputs(
    model: onnx.ModelProto,
    entries: Sequence[OutputEntry],
    records: Sequence[OutputRecord],
    stage: Stage,
    path: Path,
    *,
    optimized: bool,
    folder: Path | None = None,
) -> tuple[GateRow, ...]:
    """Cut `model` around every quantizer of an output, write the cut graph to `path`, run it and compare.

    Constants that it lacks are in files in `folder`.

    Raises:
        FidelityError: the graph quantizes other outputs than the reference, or cannot be run.
        InputError: a weight's values cannot be read from their file.
    """
    by_layer = {record.layer: record for record in records}
    check_same_layers(
        {entry.layer for entry in entries},
        by_layer,
        stage,
        missing="the quantizer of {}'s output is missing",
        unknown="the output of {} is quantized here but not in the reference",
    )
    if not entries:
        return ()
    feeds: Arrays = {entry.input: as_in_model(by_layer[entry.layer].x, by_layer[entry.layer].rank) for entry in entries}
    given = [GivenTensor.like(name, array) for name, array in feeds.items()]
    save_onnx(cut(model, given, [entry.output for entry in entries]), path, folder=folder)
    (found,) = run_graph(path, [{given_name(name): array for name, array in feeds.items()}], optimized=optimized)
    return tuple(_row(by_layer[entry.layer], entry, found, stage) for entry in entries)


def _row(record: OutputRecord, entry: OutputEntry, found: Arrays, stage: Stage) -> GateRow:
    """Codes are what the graph's numbers are, on the reference's scales, nearest to; where they agree, so must the
    numbers, which a wrong scale would not let."""
    fmt, expected, raw = get_format(record.format), record.rounded, found[entry.output]
    if raw.size != expected.size:
        raise FidelityError(f"{entry.layer}: {raw.size} numbers in its output, the reference has {expected.size}")
    numbers = raw.reshape(expected.shape).astype(np.float32)
    quotients = numbers.reshape(*record.scales.shape, -1) / record.scales[..., None]
    values = fmt.round(np.nan_to_num(quotients.reshape(expected.shape)))
    codes = compare_codes(record.x, record.scales, record.values, values, fmt)
    name = entry.output
    snr = compare_snr([{name: expected}], [{name: numbers}], {name: codes.rows_agree})[name]
    too_far = ""
    if not snr >= LINEAR_DB:
        too_far = f"SNR {bounded_db(snr):.1f} dB where codes agree, at least {LINEAR_DB:.0f} dB needed"
    return layer_row(stage, "output", entry.layer, snr, LINEAR_DB, codes, [too_far])
