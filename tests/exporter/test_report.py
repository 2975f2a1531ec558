"""The report stands alone, shows what was measured, and is safe whatever the names are."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from exporter.gate.table import GateResult, GateRow
from exporter.images import sample_grids
from exporter.metrics import Fidelity, LayerFormat, Metrics, Quality, Size
from exporter.plan import LayerPlan
from exporter.quality import LayerQuality, NoiseSnr, StepSnr
from exporter.range_scan import largest_first
from exporter.ranges import Amax
from exporter.report import Report, duration, file_size, render_report, tiles, write_report
from exporter.scale_comparison import LayerScales, ScaleKind, summarize

ROWS = (
    GateRow("exported", "linear", "blocks.0.to_q", 131.0, 100.0, passed=True, code_count=14336),
    GateRow("lowered", "end_to_end", "sample", 61.0, 40.0, passed=True),
)
LAYER = LayerPlan("blocks.0.to_q", 256, 128, True, "e2m1", "e2m3", 32, "foldable", "int8")
KINDS = (
    ScaleKind("channel", 17.31, 20_100, "int8", True),
    ScaleKind("group", 18.62, 24_200, "fp32", False),
    ScaleKind("foldable", 18.53, 21_300, "int8", True),
)
FAILED = GateRow("lowered", "linear", "blocks.0.to_q", 40.0, 100.0, passed=False, detail="output channel 3 of 9")


@pytest.fixture
def report() -> Report:
    gate = GateResult(ROWS, ("polygraphy run a.onnx --onnxrt",), ("run here",))
    samples = torch.zeros(4, 1, 8, 8)
    return Report(
        title="digits & more",
        summary="a <summary>",
        metrics=Metrics(
            target="cpu",
            size=Size(10_000_000, 2_000_000),
            fidelity=Fidelity.of(gate, 30.0),
            quality=Quality(27.31, 19.04, 0.994, 0.991),
            seconds={"calibrate": 143.2},
            versions={"torch": "2.13.0"},
            scales=summarize((LayerScales("blocks.0.to_q", "foldable", KINDS),)),
        ),
        gate=gate,
        noise=NoiseSnr(tuple(StepSnr(step, 999.0 - step, 20.0 + step, 21.0, 19.0) for step in range(5))),
        layers=(
            LayerQuality(
                "blocks.0.to_q", (256, 128), "e2m1", "e2m3", 32, "foldable", "int8", 18.25, 24.75, LAYER.product
            ),
        ),
        scales=(LayerScales("blocks.0.to_q", "foldable", KINDS),),
        grids=sample_grids(samples, samples),
        high_precision=(("proj_out", 1234567),),
        parts={"the graph": 1_000_000},
        recipe="preset: w4a6  # <none>\n",
    )


def test_what_fp16_stores_is_shown_largest_first_and_only_where_it_was_measured(report: Report) -> None:
    assert "65504" not in render_report(report)
    found = [Amax(f"t{index}", f"tensor <{index}>", 2.0**index) for index in range(16)]
    page = Page(render_report(replace(report, ranges=largest_first(found))))
    places = [page.text.index(f"tensor <{index}>") for index in range(16)]
    assert places == sorted(places, reverse=True)
    assert "The 16 largest of 16 tensors" in page.text
    assert page.text.index("3.277e+04") > places[15]


def test_chosen_formats_are_shown_with_every_candidate(report: Report) -> None:
    assert "Weight formats chosen" not in render_report(report)
    chosen = LayerFormat("blocks.0.to_q", "e1m2", {"e2m1": 30.124, "e1m2": 31.456}, {"e3m0": "does <not> fit"})
    text = Page(render_report(replace(report, metrics=replace(report.metrics, formats=(chosen,))))).text
    assert "e2m1 30.12, e1m2 31.46" in text
    assert "e3m0: does <not> fit" in text


class Page(HTMLParser):
    """Text, tags that stay open, and every address that the page refers to."""

    void = frozenset({"meta", "img", "line", "circle", "path"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "action"}]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_is_well_formed(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "a.report.html", report)
    html = (tmp_path / "a.report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.open
    assert len(page.addresses) == 2
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"https?://|@import|url\(", html)


def test_everything_measured_is_shown(report: Report) -> None:
    text = Page(render_report(report)).text
    for shown in ("20.0 %", "27.3 dB", "worst step 19.0 dB", "99.1 %", "original 99.4 %", "passed"):
        assert shown in text
    for shown in (
        "blocks.0.to_q",
        "foldable, 32",
        "19.8 of 31",
        "18.2",
        "24.8",
        "256 × 128",
        "1,234,567",
        "0 of 14,336",
    ):
        assert shown in text
    for shown in (
        "polygraphy run a.onnx",
        "run here",
        "2 min 23 s",
        "2.13.0",
        "foldable, chosen",
        "18.5",
        "24.2 kB",
        "int8, exact",
        "preset: w4a6",
        "with prompt",
    ):
        assert shown in text


def test_names_cannot_inject_markup(report: Report) -> None:
    html = render_report(replace(report, title="<script>alert(1)</script>"))
    assert "<script" not in html
    assert "a &lt;summary&gt;" in html
    assert "# &lt;none&gt;" in html


def test_a_failure_is_in_the_headline(report: Report) -> None:
    gate = GateResult((*ROWS, FAILED))
    failed = replace(report, gate=gate, metrics=replace(report.metrics, fidelity=Fidelity.of(gate, 30.0)))
    tile = tiles(failed)[-1]
    assert (tile.figure, tile.state) == ("FAILED", "bad")
    assert "blocks.0.to_q" in tile.note
    assert "output channel 3 of 9" in Page(render_report(failed)).text


def test_skipped_parts_leave_the_page_whole(report: Report) -> None:
    bare = replace(
        report,
        metrics=replace(report.metrics, fidelity=None, quality=None),
        gate=None,
        noise=None,
        layers=(),
        scales=(),
        grids=None,
        high_precision=(),
        parts={},
    )
    page = Page(render_report(bare))
    assert not page.open
    assert "--no-validate" in page.text
    assert "not measured" in page.text
    assert [tile.label for tile in tiles(bare)] == ["size", "fidelity gate"]


def test_accuracy_has_no_tile_without_a_classifier(report: Report) -> None:
    metrics = replace(report.metrics, quality=Quality(27.0, 20.0))
    assert "class accuracy" not in [tile.label for tile in tiles(replace(report, metrics=metrics))]


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (2_134_567, "2.13 MB"), (11_200, "11.2 kB"), (2.5e12, "2.5 TB")]
)
def test_file_size(count: float, text: str) -> None:
    assert file_size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (143.2, "2 min 23 s")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_block_scaling_shows_dashes_for_exactness(report: Report) -> None:
    blocks = replace(report.layers[0], scales="nvfp4", container="fp4", product=None)
    page = render_report(replace(report, layers=(blocks,)))
    assert page.count("–</td>") == 2
