"""Tiles change no bit, can be undone, and are made only where they are safe and pay."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from exporter.passes import WAIST_PASSES, lowering_passes, run_passes, tiling
from exporter.passes.layer_table import read_layer_table
from exporter.passes.tiling import TILED, tile_feed_forward, untiled
from exporter.runtime import OnnxSession
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import WaistGraph, make_weight

CPU = TARGETS["cpu"]
TOKENS, NARROW, WIDE = 512, 32, 128
# A tile of 128 tokens, where real models have megabytes.
SMALL_TILE = 128 * WIDE * 4


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "TILE_BYTES", SMALL_TILE)


def _feed_forward(activation_format: str = "e2m3", tokens: int = TOKENS, between: str = "Gelu") -> onnx.ModelProto:
    waist = WaistGraph(NARROW)
    first = make_weight("up", features=WIDE, count=NARROW)
    second = make_weight("down", features=NARROW, count=WIDE)
    hidden = waist.linear("x", first, activation_format)
    if between == "Softmax":
        hidden = waist.node("Softmax", hidden, output="hidden", axis=1)
    elif between == "row":
        rows = waist.constant("rows", np.ones((1, tokens, 1), np.float32))
        hidden = waist.node("Mul", hidden, rows, output="hidden")
    elif between == "shape":
        pairs = waist.constant("pairs", np.array([-1, tokens // 2, 2 * WIDE], np.int64))
        hidden = waist.node("Gelu", waist.node("Reshape", hidden, pairs, output="paired"), output="gelu")
        singles = waist.constant("singles", np.array([-1, tokens, WIDE], np.int64))
        hidden = waist.node("Reshape", hidden, singles, output="hidden")
    elif between == "input":
        hidden = waist.node("Add", hidden, waist.node("ReduceMax", "x", output="top", keepdims=1), output="hidden")
    else:
        hidden = waist.node(between, hidden, output="hidden")
    y = waist.linear(hidden, second, activation_format)
    return waist.model(waist.node("Neg", y, output="z"), x_shape=("batch", tokens))


def _lower(model: onnx.ModelProto) -> onnx.ModelProto:
    waist, _ = run_passes(model, WAIST_PASSES, CPU)
    return run_passes(waist, lowering_passes(CPU), CPU)[0]


def _scans(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "Scan"]


@pytest.mark.parametrize("activation_format", ["e2m3", "ue2m4", "int8"])
@pytest.mark.parametrize("batch", [1, 3])
def test_tiles_change_no_bit_and_can_be_undone(activation_format: str, batch: int) -> None:
    tiled = _lower(_feed_forward(activation_format))
    plain = untiled(tiled)
    assert [node.name for node in _scans(tiled)] == [f"down.output{TILED}"]
    assert not _scans(plain)
    onnx.checker.check_model(plain, full_check=True)
    x = np.random.default_rng(0).standard_normal((batch, TOKENS, NARROW)).astype(np.float32)
    one, other = (OnnxSession(model).run({"x": x})["z"] for model in (tiled, plain))
    assert np.array_equal(one, other)


def test_undoing_brings_every_named_tensor_back() -> None:
    tiled = _lower(_feed_forward())
    names = {name for node in untiled(tiled).graph.node for name in node.output}
    for entry in read_layer_table(tiled):
        assert {entry.values, entry.token_scales, entry.output, entry.input} - {"x"} <= names
        assert entry.encoding == "uint8"


def test_a_tile_is_the_largest_divisor_that_fits() -> None:
    for tokens, rows in ((512, 128), (384, 128), (360, 120)):
        (scan,) = _scans(_lower(_feed_forward(tokens=tokens)))
        body = next(attribute.g for attribute in scan.attribute if attribute.name == "body")
        assert body.input[0].type.tensor_type.shape.dim[0].dim_value == rows


@pytest.mark.parametrize("tokens", [128, 509], ids=["all tokens fit one tile", "a prime number of tokens"])
def test_must_not_fire_where_it_does_not_pay(tokens: int) -> None:
    assert not _scans(_lower(_feed_forward(tokens=tokens)))


@pytest.mark.parametrize("between", ["Softmax", "row", "shape", "input"])
def test_must_not_fire_where_tokens_are_not_alike(between: str) -> None:
    assert not _scans(_lower(_feed_forward(between=between)))


def test_must_not_fire_where_the_hidden_activations_are_read_elsewhere() -> None:
    model = _feed_forward()
    model.graph.output.append(onnx.helper.make_tensor_value_info("hidden", onnx.TensorProto.FLOAT, [None] * 3))
    assert not _scans(_lower(model))


def test_running_it_again_changes_nothing() -> None:
    tiled = _lower(_feed_forward())
    again, (result,) = run_passes(tiled, (tile_feed_forward,), CPU)
    assert result.changed == 0
    assert len(_scans(again)) == 1


def test_a_graph_without_tiles_is_itself() -> None:
    model = _feed_forward()
    assert untiled(model) is model


def test_what_comes_in_from_deep_below_is_found_without_recursion() -> None:
    waist = WaistGraph(NARROW)
    deep = "x"
    for depth in range(2000):
        deep = waist.node("Relu", deep, output=f"r{depth}")
    hidden = waist.linear("x", make_weight("up", features=WIDE, count=NARROW))
    hidden = waist.node("Add", hidden, waist.node("ReduceMax", deep, output="top", keepdims=1), output="hidden")
    y = waist.linear(hidden, make_weight("down", features=NARROW, count=WIDE))
    assert not _scans(_lower(waist.model(waist.node("Neg", y, output="z"), x_shape=("batch", TOKENS))))
