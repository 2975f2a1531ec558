"""The range scan tells what FP16 and BF16 make of every tensor's largest number."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from exporter.cli import main
from exporter.range_scan import Range, RangeScan, bar
from exporter.ranges import Amax


@pytest.mark.parametrize(
    ("value", "fp16"),
    [
        (math.nan, "not finite"),
        (math.inf, "not finite"),
        (70000.0, "infinite"),
        (65504.0, "tight"),
        (32753.0, "tight"),
        (32752.0, "fits"),
        (1.0, "fits"),
        (0.0, "fits"),
        (6.0e-5, "loses bits"),
        (6.2e-5, "fits"),
    ],
)
def test_every_size_has_its_verdict(value: float, fp16: str) -> None:
    found = Range.of(Amax("t", "t", value))
    assert found.fp16 == fp16
    assert (found.amax is None) == (not math.isfinite(value))
    assert found.bf16_error == (None if found.amax is None else value / 256)


def test_the_largest_come_first_and_the_sentence_names_them() -> None:
    found = [Amax("a", "a", 1.0), Amax("b", "place of b", 80000.0), Amax("c", "c", 40000.0)]
    scan = RangeScan.of("r", 4, found)
    assert [one.tensor for one in scan.ranges] == ["b", "c", "a"]
    assert "overflows in 1 of 3 tensors, most at place of b" in scan.verdict
    assert "1 of 2 tensors leave" in RangeScan.of("r", 4, [found[0], found[2]]).verdict
    assert "FP16 holds all 1" in RangeScan.of("r", 4, found[:1]).verdict
    broken = RangeScan.of("r", 4, [*found, Amax("d", "place of d", math.nan)])
    assert broken.ranges[0].tensor == "d"
    assert "FP32 itself overflows in 1 of 4 tensors, most at place of d" in broken.verdict


def test_bars_grow_with_the_logarithm() -> None:
    lengths = [len(bar(float(2**power))) for power in range(-4, 16)]
    assert lengths[0] == 0
    assert lengths == sorted(lengths)
    assert np.ptp(np.diff(lengths)) <= 1
    assert bar(65504.0) == "█" * 30
    assert bar(1e9) == bar(None) == "█" * 30 + "▶"


@pytest.mark.slow
def test_the_command_shares_the_exports_work_folder(tiny_export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_export.with_name("tiny.yaml")
    words = [str(recipe), "-o", str(tiny_export)]
    before = tiny_export.stat().st_mtime_ns
    assert main(["ranges", *words, "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert "calibrated earlier" in captured.err
    assert document["inputs"] == 12
    assert document["verdict"].startswith("FP16 holds all")
    assert tiny_export.stat().st_mtime_ns == before
    assert main(["ranges", *words, "--top", "2", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["ranges", *words, "--top", "2"]) == 0
    text = capsys.readouterr().out
    assert f"the 2 largest of {len(document['ranges'])} tensors on 12 inputs" in text
    assert document["ranges"][1]["place"] in text
    assert document["ranges"][2]["place"] not in text
