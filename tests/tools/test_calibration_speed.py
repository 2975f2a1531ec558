"""What the race against the published calibration says of its runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exporter.calibration.inputs import CalibrationRun
from exporter.calibration_stages import captured_inputs
from exporter.model_stages import balanced
from exporter.progress import NullProgress
from exporter.source import load_source
from tools.calibration_speed import Run, ours, table, timed, verdict
from tools.quality_cells.cells import Laboratory

RECIPE = Path(__file__).parents[2] / "recipes" / "digits.yaml"

SHORT, LONG = (
    Run("published", 100.0, (2e-4, 1e-4), 250),
    Run("published", 1e3, (1e-4, 1e-5), 2500),
)


def test_only_what_is_as_good_in_every_block_counts() -> None:
    quick, good = Run("quick", 1.0, (1e-4, 1.1e-4)), Run("good", 10.0, (2e-4, 1e-5))
    assert verdict(SHORT, [quick, good]).startswith("Met: 5 × the speed of 250 iterations")
    assert "good, 10.0 × as fast" in verdict(SHORT, [quick, good])
    assert verdict(SHORT, [quick, Run("slow", 21.0, (0.0, 0.0))]).startswith("**Missed**: 5 ×")
    assert verdict(SHORT, [quick]).startswith("**Missed**: none of ours has the error of 250 iterations")
    assert verdict(LONG, [quick, good]).startswith("**Missed**: none of ours has the error of 2500 iterations")


def test_the_table_has_every_run_against_every_published_one() -> None:
    text = table([SHORT, LONG], [Run("good", 10.0, (2e-4, 1e-5))])
    assert "| good | 10 | 2.00e-04 | 1.00e-05 | 10.0 | 100.0 |" in text
    heading, rule = text.splitlines()[2:4]
    assert heading.endswith("| 250 iterations ÷ its time | 2500 iterations ÷ its time |")
    assert heading.count("|") == rule.count("|")
    assert "PyTorch" in text


@pytest.fixture
def laboratory(tmp_path: Path) -> Laboratory:
    return Laboratory(RECIPE, tmp_path, tmp_path / "cells", NullProgress())


def test_a_row_is_balanced_as_its_recipe_says_and_measured_on_its_own_shared_inputs(laboratory: Laboratory) -> None:
    job = laboratory.job(("calibration.samples=1", "calibration.steps=4"), "speed")
    source = load_source(job)
    run = CalibrationRun(source.adapter, captured_inputs(job, source), source.prompts)
    nearest = ("method.name=rtn", "method.scale_search=absmax")
    work = laboratory.folder / "speed.work"
    plain = ours(laboratory, run, (*nearest, "method.balance=false"))
    assert not any(work.glob("balance.*"))
    even = ours(laboratory, run, (*nearest, "method.balance=true"))
    (balance,) = work.glob("balance.*.safetensors")
    made = balance.stat().st_mtime_ns
    shared = [model.get_submodule("caption_projection.linear_2").weight for model in (source.model, plain, even)]
    assert torch.equal(shared[0], shared[1])
    assert not torch.equal(shared[0], shared[2])
    errors = [timed("", run, source, lambda model=model: model).errors for model in (source.model, plain, even)]
    assert max(errors[0]) == 0
    assert 0 < max(errors[2]) < max(errors[1]) < 0.05
    ours(laboratory, run, (*nearest, "method.balance=true"))
    assert balance.stat().st_mtime_ns > made, "a later row did not pay for it"


def test_balancing_alone_is_no_error(laboratory: Laboratory) -> None:
    job = laboratory.job(("calibration.samples=1", "calibration.steps=4", "method.balance=true"), "speed")
    source = load_source(job)
    captured = captured_inputs(job, source)
    run = CalibrationRun(source.adapter, captured, source.prompts)
    even = balanced(job, source, captured).model
    assert max(timed("", run, source, lambda: even).errors) < 1e-9
