"""GELU, gate and residual become part of the linear in front of them, and only where its result is needed nowhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from tests.exporter.passes.plugins.plugin_graphs import PluginGraph, endings, kinds, lowered
from tests.exporter.passes.waist_graphs import make_weight, run, snr_db, tokens

FC = make_weight("fc", features=64)
NARROW = make_weight("narrow", features=24)


def _agrees(model: onnx.ModelProto) -> bool:
    return all(
        snr_db(expected, found) > 100
        for expected, found in zip(run(model, tokens()), run(lowered(model), tokens()), strict=True)
    )


@pytest.mark.parametrize("gate", ["per_sample", "row", "none"])
@pytest.mark.parametrize("residual_first", [True, False])
def test_residual(gate: str, residual_first: bool) -> None:
    graph = PluginGraph()
    y = graph.linear("x", FC)
    if gate != "none":
        row = graph.per_sample("x", "gate") if gate == "per_sample" else graph.row("gate")
        y = graph.node("Mul", row, y, output="gated")
    model = graph.model(graph.node("Add", *(("x", y) if residual_first else (y, "x")), output="sum"))
    assert kinds(lowered(model)) == ["TokenQuantize"] + ["ReduceMean"] * (gate == "per_sample") + ["PackedLinear"]
    assert endings(lowered(model), "PackedLinear") == ["bias_residual"]
    assert _agrees(model)


def test_residuals_of_a_chain_keep_the_names_of_blocks() -> None:
    graph = PluginGraph()
    first = graph.node("Add", "x", graph.linear("x", FC), output="first")
    marked = graph.boundary(first, "blocks.0.output", "marked")
    second = make_weight("second", features=64)
    model = graph.model(graph.node("Add", graph.linear(marked, second), marked, output="last"))
    assert endings(lowered(model), "PackedLinear") == ["bias_residual", "bias_residual"]
    assert lowered(model).graph.node[1].output[0] == "blocks.0.output"
    assert _agrees(model)


def test_two_linears_in_one_sum_are_fused_once() -> None:
    graph = PluginGraph()
    other = make_weight("other", features=64)
    model = graph.model(graph.node("Add", graph.linear("x", FC), graph.linear("x", other), output="sum"))
    assert sorted(endings(lowered(model), "PackedLinear")) == ["bias", "bias_residual"]
    assert _agrees(model)


def _read_elsewhere(graph: PluginGraph) -> list[str]:
    y = graph.linear("x", FC)
    return [graph.node("Add", "x", y, output="sum"), graph.node("Neg", y, output="negated")]


def _gated_read_elsewhere(graph: PluginGraph) -> list[str]:
    gated = graph.node("Mul", graph.row("gate"), graph.linear("x", FC), output="gated")
    return [graph.node("Add", "x", gated, output="sum"), graph.node("Neg", gated, output="negated")]


def _is_an_output(graph: PluginGraph) -> list[str]:
    y = graph.linear("x", FC)
    return [graph.node("Add", "x", y, output="sum"), y]


def _broadcast(graph: PluginGraph) -> list[str]:
    return [graph.node("Add", graph.row("one_row"), graph.linear("x", FC), output="sum")]


def _one_sample_for_all_gates(graph: PluginGraph) -> list[str]:
    y = graph.linear(graph.one_sample("x"), FC)
    gated = graph.node("Mul", graph.per_sample("x", "gate"), y, output="gated")
    return [graph.node("Add", "x", gated, output="sum")]


def _named_block(graph: PluginGraph) -> list[str]:
    y = graph.boundary(graph.linear("x", FC), "blocks.0.output", "marked")
    gated = graph.boundary(graph.node("Mul", graph.row("gate"), y, output="gated"), "blocks.1.output", "marked_too")
    return [graph.node("Add", "x", gated, output="sum")]


@pytest.mark.parametrize(
    "build",
    [_read_elsewhere, _gated_read_elsewhere, _is_an_output, _broadcast, _one_sample_for_all_gates, _named_block],
)
def test_residual_that_stays(build: Callable[[PluginGraph], list[str]]) -> None:
    graph = PluginGraph()
    model = graph.model(*build(graph))
    assert endings(lowered(model), "PackedLinear") == ["bias"]
    assert _agrees(model)


def test_gate_per_token_leaves_the_product_outside() -> None:
    graph = PluginGraph()
    per_token = graph.constant("per_token", np.full((1, 5, 64), 2, np.float32))
    gated = graph.node("Mul", per_token, graph.linear("x", FC), output="gated")
    model = graph.model(graph.node("Add", "x", gated, output="sum"))
    assert endings(lowered(model), "PackedLinear") == ["bias"]
    assert _agrees(model)


@pytest.mark.parametrize(("approximation", "ending"), [("tanh", "bias_gelu"), ("none", "bias")])
def test_gelu_that_no_quantizer_reads(approximation: str, ending: str) -> None:
    graph = PluginGraph()
    y = graph.node("Gelu", graph.linear("x", NARROW), output="activated", approximate=approximation)
    model = graph.model(graph.node("Neg", y, output="negated"))
    assert endings(lowered(model), "PackedLinear") == [ending]
    assert _agrees(model)


def test_gelu_then_residual_are_both_fused_but_not_two_gelus() -> None:
    graph = PluginGraph()
    y = graph.node("Gelu", graph.linear("x", FC), output="activated", approximate="tanh")
    again = graph.node("Gelu", graph.linear("x", NARROW), output="again", approximate="tanh")
    twice = graph.node("Gelu", again, output="twice", approximate="tanh")
    model = graph.model(graph.node("Add", "x", y, output="sum"), graph.node("Neg", twice, output="negated"))
    assert sorted(endings(lowered(model), "PackedLinear")) == ["bias_gelu", "bias_gelu_residual"]
    assert _agrees(model)


def test_gelu_that_a_quantizer_reads_is_the_quantizers() -> None:
    graph = PluginGraph()
    y = graph.node("Gelu", graph.linear("x", FC), output="activated", approximate="tanh")
    model = graph.model(graph.linear(y, NARROW))
    assert kinds(lowered(model)) == ["TokenQuantize", "PackedLinear", "GeluQuantize", "PackedLinear"]
    assert endings(lowered(model), "PackedLinear") == ["bias", "bias"]
