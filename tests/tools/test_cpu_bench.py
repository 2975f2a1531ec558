"""The CPU benchmark measures what it says, and its page states what was measured."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from exporter.models.pixart import PixArtAdapter
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.progress import NullProgress
from exporter.runtime import OnnxSession
from exporter.targets import TARGETS
from tests.exporter.models.small_families import pixart
from tests.exporter.passes.waist_graphs import WaistGraph, make_weight
from tools.cpu_bench.digits import Row
from tools.cpu_bench.graphs import DYNAMIC, FP32, FP32_FUSED, VARIANTS, export_float
from tools.cpu_bench.measure import (
    ATTENTION,
    Memory,
    gemm_seconds,
    memory_of,
    product_shapes,
    profile,
    side_by_side,
    snr_db,
)
from tools.cpu_bench.page import Page, Result, draw, markdown

CPU = TARGETS["cpu"]
OURS = list(VARIANTS)[:2]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lowered graph of two layers; its output is called as the transformer's."""
    waist = WaistGraph(64)
    hidden = waist.linear("x", make_weight("blocks.0.ff", features=96))
    y = waist.linear(hidden, make_weight("blocks.0.attn2.to_k", features=32, count=96))
    model = waist.model(waist.node("Relu", y, output="sample"))
    model = run_passes(model, (*WAIST_PASSES, *lowering_passes(CPU)), CPU)[0]
    path: Path = tmp_path_factory.mktemp("bench") / "small.onnx"
    onnx.save(model, path)
    return path


def test_graphs_run_side_by_side_on_the_same_inputs(small: Path) -> None:
    seconds, outputs = side_by_side({"one": small, "other": small}, 3, NullProgress())
    assert {name: len(values) for name, values in seconds.items()} == {"one": 3, "other": 3}
    assert np.array_equal(outputs["one"], outputs["other"])


def test_the_float_graph_computes_what_torch_does(tmp_path: Path) -> None:
    model, adapter, path = pixart(), PixArtAdapter(), tmp_path / "float.onnx"
    export_float(model, path, tokens=4)
    inputs = adapter.example_inputs(model, batch=3, tokens=4)
    with torch.no_grad():
        expected = adapter.forward(model, inputs)
    found = OnnxSession(path).run(inputs.as_numpy())["sample"]
    assert snr_db(expected.numpy(), found) > 80


def test_memory_is_that_of_a_process_of_its_own(small: Path) -> None:
    memory = memory_of(small)
    assert 0 < memory.loaded <= memory.running <= memory.peak < 2e9
    assert memory.load_seconds > 0


def test_what_expanding_weights_took_is_given_back(tmp_path: Path) -> None:
    waist, x, size, layers = WaistGraph(512), "x", 512, 60
    for index in range(layers):
        x = waist.linear(x, make_weight(f"blocks.{index}.fc", features=size, count=size, group_size=128))
    model = waist.model(waist.node("Relu", x, output="sample"))
    onnx.save(run_passes(model, (*WAIST_PASSES, *lowering_passes(CPU)), CPU)[0], tmp_path / "deep.onnx")
    # A byte each for the weights as the runtime multiplies them, and as much again for all else; not the ten that
    # expanding them takes.
    assert memory_of(tmp_path / "deep.onnx").loaded < 4 * layers * size * size


def test_the_profile_knows_the_operators(small: Path, tmp_path: Path) -> None:
    kinds = profile(small, tmp_path, runs=2)
    assert kinds["integer GEMM"] > 0
    assert kinds["quantizers"] > 0
    assert list(tmp_path.iterdir()) == []


def test_shapes_of_the_products(small: Path) -> None:
    shapes = product_shapes(small, tokens=20, caption_tokens=8)
    assert dict(shapes) == {(20, 64, 96): 1, (8, 96, 32): 1}
    assert gemm_seconds(shapes, runs=1) > 0


def test_signal_to_noise_is_of_the_first_channels() -> None:
    reference = np.ones((1, 8, 2, 2))
    values = reference.copy()
    values[:, :4] *= 1.1
    assert snr_db(reference, values) == pytest.approx(20.0)
    values[:, 4:] = 0
    assert snr_db(reference, values) == pytest.approx(20.0)


def _page() -> Page:
    names = (FP32, FP32_FUSED, DYNAMIC, *VARIANTS)
    results = [
        Result(name, [4.0 / (i + 1)] * 3, 1000 // (i + 1), Memory(8, 10 // (i + 1), 12, 0.5), None if i == 0 else 30.0)
        for i, name in enumerate(names)
    ]
    profiles = {name: {"integer GEMM": 1.0, ATTENTION: 0.5, "GELU": 0.25} for name in (FP32, *OURS)}
    digits = [Row(DYNAMIC, 30.0, 20.0), Row("W4A6", 42.0, 29.0)]
    return Page(28, 3, results, profiles, 0.75, digits)


def test_the_page_states_ratios_to_fp32() -> None:
    text = markdown(_page())
    assert "Written by `python -m tools.bench`." in text
    assert f"| {DYNAMIC} | 1.33 s (1.33) | 3.00 | 30.0 dB | 0.333 | 0.30 | 1.00 | 0.5 s |" in text
    assert "| GELU | 0.250 | 0.250 | 0.250 |" in text
    # A blank line would end a table.
    assert re.findall(r"\|\n\n\|", text) == []
    assert "take 0.750 s, 43 % of a step" in text
    assert "| W4A6 | 42.0 dB | 29.0 dB | +12.0 dB |" in text


def test_a_missed_aim_is_called_missed() -> None:
    lines = [line for line in markdown(_page()).splitlines() if "| met |" in line or "| **missed** |" in line]
    assert len(lines) == 10
    assert f"| {OURS[0]} at least 2.0 × FP32 | 4.00 | met |" in lines
    assert f"| {OURS[1]} at least 8 dB closer to FP32 than {DYNAMIC}, this model | 0.00 | **missed** |" in lines
    assert f"| {OURS[0]} file at most 0.17 of FP32 | 0.250 | **missed** |" in lines


def test_the_picture_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw(_page(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
