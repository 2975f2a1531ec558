"""What calibration costs by arithmetic, and the page that has it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from exporter import load_recipe
from exporter.source import activation_bytes
from tools import calibration_cost
from tools.calibration_cost import JOBS, PAGE, SECTION, extrapolated_table, kept_table, main
from tools.calibration_cost_gpu import BLOCKS
from tools.marked_section import markers

BY_NAME = {job.name: job for job in JOBS}
HUNYUAN = BY_NAME["Hunyuan-DiT 1.2, 1024"]


def test_skips_and_captions_count_as_the_exporter_counts_them() -> None:
    output = 4096 * 1408
    assert HUNYUAN.activations == 6400 * activation_bytes(output, 19, 333 * 1408)
    assert HUNYUAN.activations / 1e9 == pytest.approx(6065, abs=1)
    assert BY_NAME["PixArt-α 512"].activations == 2560 * 4 * 1152 * (3 * 1024 + 120)


def test_the_thinned_job_has_its_recipes_inputs() -> None:
    assert BY_NAME["the same, each 4th step"].inputs == load_recipe("hunyuan_dit_v1_2_w4a6").calibration.inputs


def test_the_page_has_what_the_tools_compute() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert f"By arithmetic:\n\n{extrapolated_table()}\n{markers(SECTION)[1]}" in text
    for block in BLOCKS[:3]:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {block.model} |") and " ms |" in line][-1:]
        assert f"| {block.job.activations / 1e9:,.0f} GB " in row


def test_arithmetic_alone_leaves_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        PAGE.read_text(encoding="utf-8").replace("| 6,065 GB | 758 GB |", "| 1 GB | 0 GB |"), encoding="utf-8"
    )
    monkeypatch.setattr(calibration_cost, "cpu_seconds", lambda *_: pytest.fail("measured"))
    assert CliRunner().invoke(main, ["--arithmetic-only", "--page", str(page)]).exit_code == 0
    assert page.read_bytes() == PAGE.read_bytes()
    assert kept_table(page).count("\n") == 9


def test_a_page_without_a_measured_table_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n", encoding="utf-8")
    result = CliRunner().invoke(main, ["--arithmetic-only", "--page", str(page)])
    assert result.exit_code == 1
    assert "has no measured table yet" in result.output
    assert page.read_text(encoding="utf-8") == "# Page\n"
