"""What enters the quantized linears of a block that is given the reference's inputs.

A wide residual stream can hide a fault of attention, norms or modulation from the block's output; what a linear reads
shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from exporter.gate.records import LinearRecord, Reference
from exporter.gate.rows import chosen_rows
from exporter.gate.runs import Arrays, compare_snr
from exporter.gate.table import GateRow, bounded_db
from exporter.passes.layer_table import LayerEntry

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


def entering(layers: Sequence[LayerEntry], block: str, reference: Reference) -> list[LayerEntry]:
    """One layer of the block for every tensor that layers of it read, but for the reference's boundaries."""
    inside = [entry for entry in layers if entry.layer.startswith(f"{block}.")]
    first = {entry.input: entry for entry in reversed(inside)}
    boundaries = reference.models[0].boundaries
    return [entry for entry in inside if first[entry.input] is entry and entry.input not in boundaries]


def input_rows(
    block: GateRow, entries: Iterable[LayerEntry], reference: Reference, outputs: Sequence[Arrays]
) -> list[InputRow]:
    """The rows of one block; `outputs` has the layers' inputs, one mapping per timestep.

    Where the block as a whole deviates, its own limit is asked for.
    """
    records = {record.layer: record for record in reference.linears}
    needed = min(INPUT_DB, block.threshold_db) if block.passed else block.threshold_db
    return [
        InputRow(block.name, entry.layer, _snr(records[entry.layer], [one[entry.input] for one in outputs]), needed)
        for entry in entries
    ]


def judged_by_inputs(block: GateRow, rows: Iterable[InputRow]) -> GateRow:
    """The block's row, failed also where what enters one of its linears deviates; the first is named."""
    wrong = next((row for row in rows if not row.passed), None)
    if wrong is None or not block.passed:
        return block
    detail = f"what enters {wrong.layer} has SNR {wrong.snr_db:.1f} dB, at least {wrong.needed_db:.1f} dB needed"
    return replace(block, passed=False, detail=detail)


def _snr(record: LinearRecord, arrays: Sequence[npt.NDArray[np.generic]]) -> float:
    """SNR on the token rows that the reference recorded, as many of each array; the lowest where rows do not match."""
    captured = record.x[: len(record.x) - record.probes]
    flat = [array.reshape(-1, array.shape[-1]) for array in arrays]
    rows = np.concatenate([array[chosen_rows(len(array), len(captured) // len(flat)).numpy()] for array in flat])
    return bounded_db(compare_snr([{record.layer: captured}], [{record.layer: rows}]).get(record.layer, np.nan))
