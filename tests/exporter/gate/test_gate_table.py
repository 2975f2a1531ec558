"""The verdict: what fails first, what is written, what is shown."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from exporter.gate.table import SNR_CEILING_DB, GateResult, GateRow, bounded_db, summary_table

ROWS = (
    GateRow("exported", "linear", "a.fc", 130.0, 100.0, passed=True, code_mismatches=1, explained=1, code_count=1000),
    GateRow("exported", "linear", "b.fc", 62.9, 100.0, passed=False, code_count=1000, detail="output channel 3"),
    GateRow("exported", "block", "b", 30.0, 40.0, passed=False),
    GateRow("lowered", "end_to_end", "sample", SNR_CEILING_DB, 40.0, passed=True),
)


@pytest.mark.parametrize(("given", "kept"), [(math.inf, 200), (-math.inf, -200), (math.nan, -200), (99.5, 99.5)])
def test_every_snr_is_valid_json(given: float, kept: float) -> None:
    assert bounded_db(given) == kept


def test_the_first_failure_is_the_first_failing_row() -> None:
    result = GateResult(ROWS)
    assert not result.passed
    assert result.first_failure is ROWS[1]
    assert ROWS[1].sentence() == "linear b.fc (exported graph): output channel 3"
    assert "SNR 30.0 dB, at least 40.0 dB needed" in ROWS[2].sentence()
    assert GateResult(ROWS[:1]).first_failure is None


def test_nothing_compared_is_no_pass() -> None:
    assert not GateResult(()).passed
    assert GateResult(()).worst_snr_db("linear") is None
    assert GateResult(()).code_mismatch_fraction == 0


def test_figures() -> None:
    result = GateResult(ROWS)
    assert result.worst_snr_db("linear") == 62.9
    assert result.worst_snr_db("linear", "block") == 30.0
    assert result.code_mismatch_fraction == 1 / 2000


def test_json_round_trip() -> None:
    result = GateResult(ROWS, ("polygraphy run x",), ("a note",))
    assert GateResult.from_json(result.to_json()) == result
    document = json.loads(result.to_json())
    assert document["passed"] is False
    assert document["first_failure"].startswith("linear b.fc")


def test_the_table_shows_the_worst_of_each_kind_and_every_failure() -> None:
    shown = io.StringIO()
    Console(width=120, file=shown).print(summary_table(GateResult(ROWS)))
    text = shown.getvalue()
    assert text.count("b.fc") == 2
    assert "a.fc" not in text
    assert "1 of 2000" in text
    assert "exact" in text
