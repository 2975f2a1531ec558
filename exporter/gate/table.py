"""The gate's rows and verdict, as data, as JSON and as a table for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from rich.table import Table

Stage: TypeAlias = Literal["exported", "lowered"]
Kind: TypeAlias = Literal["linear", "output", "stem", "block", "tail", "tiles", "end_to_end"]

# Written for a deviation of exactly zero, because JSON has no infinity; float32 itself ends near 150 dB.
SNR_CEILING_DB = 200.0
MOST_FAILURES = 20


def bounded_db(snr_db: float) -> float:
    """`snr_db` within ±SNR_CEILING_DB; NaN, which nothing passes with, becomes the lower end."""
    if math.isnan(snr_db):
        return -SNR_CEILING_DB
    return min(max(snr_db, -SNR_CEILING_DB), SNR_CEILING_DB)


@dataclass(frozen=True)
class GateRow:
    """One comparison of a graph with the reference.

    `snr_db` is the reference's power over the deviation's, the worst over iterations, bounded to ±200 dB.
    `code_mismatches` counts quantized activations that differ, `explained` those of them that lie within a few ulp
    of a rounding boundary, out of `code_count`; layers that share a quantizer count its codes once.
    """

    stage: Stage
    kind: Kind
    name: str
    snr_db: float
    threshold_db: float
    passed: bool
    code_mismatches: int = 0
    explained: int = 0
    code_count: int = 0
    detail: str = ""

    def sentence(self) -> str:
        """What this row found, for an error message."""
        found = self.detail or f"SNR {self.snr_db:.1f} dB, at least {self.threshold_db:.1f} dB needed"
        return f"{self.kind.replace('_', ' ')} {self.name} ({self.stage} graph): {found}"


@dataclass(frozen=True)
class GateResult:
    """All rows in graph order, the commands that repeat the comparisons, and remarks on what was not compared."""

    rows: tuple[GateRow, ...]
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every row passed; false when there are none."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def first_failure(self) -> GateRow | None:
        """The first failing row: exported before lowered, linears in graph order before blocks."""
        return next((row for row in self.rows if not row.passed), None)

    def worst_snr_db(self, *kinds: Kind) -> float | None:
        """The smallest SNR of the rows of these kinds, None when there are none."""
        return min((row.snr_db for row in self.rows if row.kind in kinds), default=None)

    @property
    def code_mismatch_fraction(self) -> float:
        """Mismatching codes over compared codes, both stages; 0 when nothing is quantized."""
        compared = sum(row.code_count for row in self.rows)
        return sum(row.code_mismatches for row in self.rows) / compared if compared else 0.0

    def to_json(self) -> str:
        """The result as indented JSON."""
        document = {"passed": self.passed, "first_failure": None, **asdict(self)}
        if self.first_failure is not None:
            document["first_failure"] = self.first_failure.sentence()
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> GateResult:
        """Read back what `to_json` wrote. Raises KeyError, TypeError or ValueError on anything else."""
        document = json.loads(text)
        rows = tuple(GateRow(**row) for row in document["rows"])
        return cls(rows, tuple(document["commands"]), tuple(document["notes"]))


@dataclass(frozen=True)
class RowGroup:
    """All rows of one kind in one graph, in words, and the row nearest to failing (or worst failing)."""

    compared: str
    worst: GateRow
    passed: bool
    code_mismatches: int
    code_count: int


_COMPARED: Mapping[Kind, str] = {
    "linear": "linears",
    "output": "quantized outputs",
    "stem": "before the blocks",
    "block": "blocks",
    "tail": "after the blocks",
    "tiles": "tiled or not",
    "end_to_end": "end to end",
}


def grouped(rows: Iterable[GateRow]) -> list[RowGroup]:
    """The rows by graph and kind, in order of first appearance."""
    groups: dict[tuple[Stage, Kind], list[GateRow]] = {}
    for row in rows:
        groups.setdefault((row.stage, row.kind), []).append(row)
    return [
        RowGroup(
            compared=f"{len(group)} {_COMPARED[kind]}" if kind in ("linear", "output", "block") else _COMPARED[kind],
            worst=min(group, key=lambda row: (row.passed, row.snr_db - row.threshold_db)),
            passed=all(row.passed for row in group),
            code_mismatches=sum(row.code_mismatches for row in group),
            code_count=sum(row.code_count for row in group),
        )
        for (_, kind), group in groups.items()
    ]


def summary_table(result: GateResult) -> Table:
    """One line per graph and kind with its worst row; then the failing rows, at most MOST_FAILURES."""
    table = Table(title="fidelity: " + ("passed" if result.passed else "FAILED"), title_justify="left")
    for heading in ("graph", "compared", "worst", "SNR dB", "needed", "codes differing", ""):
        table.add_column(heading, justify="right" if heading in {"SNR dB", "needed"} else "left")
    for group in grouped(result.rows):
        _add(table, group.worst, group.compared, group.code_mismatches, group.code_count)
    failures = [row for row in result.rows if not row.passed]
    if failures:
        table.add_section()
    for row in failures[:MOST_FAILURES]:
        _add(table, row, row.kind.replace("_", " "), row.code_mismatches, row.code_count)
    return table


def _add(table: Table, row: GateRow, compared: str, mismatches: int, count: int) -> None:
    snr = "exact" if row.snr_db >= SNR_CEILING_DB else f"{row.snr_db:.1f}"
    codes = f"{mismatches} of {count}" if count else ""
    verdict = "[green]ok[/]" if row.passed else "[bold red]FAILED[/]"
    table.add_row(row.stage, compared, row.name, snr, f"{row.threshold_db:.1f}", codes, verdict)
