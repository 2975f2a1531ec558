"""What the comparisons of linears and of quantized outputs, layer by layer on recorded rows, have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from exporter.errors import FidelityError
from exporter.gate.codes import CodeComparison
from exporter.gate.records import Floats
from exporter.gate.table import GateRow, Kind, Stage, bounded_db


def check_same_layers(
    present: Collection[str], recorded: Collection[str], stage: Stage, *, missing: str, unknown: str
) -> None:
    """Raise `FidelityError` unless the graph has the recorded layers; `missing` and `unknown` say of which layer, {},
    it lacks something or has too much."""
    for layer in recorded:
        if layer not in present:
            raise FidelityError(f"{stage} graph: {missing.format(layer)}")
    for layer in present:
        if layer not in recorded:
            raise FidelityError(f"{stage} graph: {unknown.format(layer)}")


def as_in_model(rows: Floats, rank: int) -> Floats:
    """Rows [R, …] with as many axes as their tensor has in the model."""
    return rows.reshape((1,) * (rank - 2) + rows.shape)


def layer_row(
    stage: Stage,
    kind: Kind,
    name: str,
    snr: float,
    limit: float,
    codes: CodeComparison | None,
    failures: Iterable[str],
) -> GateRow:
    """The row of a layer that passes unless its `codes`, if any are its to count, or one of the `failures`, empty where
    nothing is wrong, say otherwise."""
    found = [failure for failure in ("" if codes is None else codes.failure, *failures) if failure]
    return GateRow(
        stage=stage,
        kind=kind,
        name=name,
        snr_db=bounded_db(snr),
        threshold_db=limit,
        passed=not found,
        code_mismatches=codes.mismatches if codes else 0,
        explained=codes.explained if codes else 0,
        code_count=codes.count if codes else 0,
        detail="; ".join(found),
    )
