"""Norms and GELUs become part of the quantizer behind them, and only where nobody else needs what lies between."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from exporter.passes import PLUGIN_PASSES, WAIST_PASSES, run_passes
from tests.exporter.passes.plugins.plugin_graphs import PLUGIN_TARGETS, PluginGraph, kinds, lowered
from tests.exporter.passes.waist_graphs import make_weight, run, snr_db, tokens

FC = make_weight("fc", group_size=0, kind="channel")


def _agrees(model: onnx.ModelProto) -> bool:
    """The lowered graph computes what the exporter's does; a norm rounds otherwise, so a code may flip."""
    return all(
        snr_db(expected, found) > 40
        for expected, found in zip(run(model, tokens()), run(lowered(model), tokens()), strict=True)
    )


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_modulated_norm(per_sample: bool, shared: bool) -> None:
    graph = PluginGraph()
    rows = [graph.per_sample("x", name) if per_sample else graph.row(name, seed) for seed, name in enumerate("ab")]
    x = graph.modulated("x", *rows)
    outputs = [graph.linear(x, FC)]
    if shared:
        outputs.append(graph.linear(x, make_weight("other", group_size=0, kind="channel")))
    model = graph.model(*outputs)
    assert kinds(lowered(model)) == ["ReduceMean"] * (2 * per_sample) + ["NormQuantize"] + ["PackedLinear"] * (
        1 + shared
    )
    assert _agrees(model)


@pytest.mark.parametrize("weights", [0, 1, 2])
def test_norm_with_its_own_weights(weights: int) -> None:
    graph = PluginGraph()
    rng = np.random.default_rng(0)
    arrays = [graph.constant(f"w{index}", rng.standard_normal(64).astype(np.float32)) for index in range(weights)]
    model = graph.model(graph.linear(graph.norm("x", *arrays), FC))
    assert kinds(lowered(model)) == ["NormQuantize", "PackedLinear"]
    assert _agrees(model)


def _other_epsilon(graph: PluginGraph) -> list[str]:
    return [graph.linear(graph.modulated("x", graph.row("a"), graph.row("b"), epsilon=1e-5), FC)]


def _other_axis(graph: PluginGraph) -> list[str]:
    ones = graph.constant("ones_both", np.ones((5, 64), np.float32))
    return [graph.linear(graph.norm("x", ones, axis=1), FC)]


def _read_elsewhere(graph: PluginGraph) -> list[str]:
    x = graph.modulated("x", graph.row("a"), graph.row("b"))
    return [graph.linear(x, FC), graph.node("Neg", x, output="negated")]


def _inside_read_elsewhere(graph: PluginGraph) -> list[str]:
    y = graph.linear(graph.modulated("x", graph.row("a"), graph.row("b")), FC)
    return [y, graph.node("Neg", "scaled", output="negated")]


def _weights_and_modulation(graph: PluginGraph) -> list[str]:
    weights = graph.constant("w", np.full(64, 2, np.float32))
    product = graph.node("Mul", graph.norm("x", weights), graph.row("a"), output="scaled")
    return [graph.linear(graph.node("Add", product, graph.row("b"), output="shifted"), FC)]


def _rows_of_two_kinds(graph: PluginGraph) -> list[str]:
    return [graph.linear(graph.modulated("x", graph.per_sample("x", "a"), graph.row("b")), FC)]


def _row_per_token(graph: PluginGraph) -> list[str]:
    per_token = graph.constant("per_token", np.ones((1, 5, 64), np.float32))
    return [graph.linear(graph.modulated("x", per_token, graph.row("b")), FC)]


def _one_sample_for_all_modulations(graph: PluginGraph) -> list[str]:
    rows = [graph.per_sample("x", name) for name in "ab"]
    return [graph.linear(graph.modulated(graph.one_sample("x"), *rows), FC)]


def _named_block(graph: PluginGraph) -> list[str]:
    x = graph.modulated("x", graph.row("a"), graph.row("b"))
    return [graph.linear(graph.boundary(x, "blocks.0.output", "marked"), FC)]


@pytest.mark.parametrize(
    "build",
    [
        _other_epsilon,
        _other_axis,
        _read_elsewhere,
        _inside_read_elsewhere,
        _weights_and_modulation,
        _rows_of_two_kinds,
        _row_per_token,
        _one_sample_for_all_modulations,
        _named_block,
    ],
)
def test_norm_that_stays(build: Callable[[PluginGraph], list[str]]) -> None:
    graph = PluginGraph()
    model = graph.model(*build(graph))
    assert "NormQuantize" not in kinds(lowered(model))
    assert {"LayerNormalization", "TokenQuantize"} <= set(kinds(lowered(model)))
    assert _agrees(model)


@pytest.mark.parametrize(("approximation", "read_elsewhere"), [("tanh", False), ("none", False), ("tanh", True)])
def test_gelu_before_a_quantizer(approximation: str, read_elsewhere: bool) -> None:
    graph = PluginGraph()
    activated = graph.node("Gelu", "x", output="activated", approximate=approximation)
    outputs = [graph.linear(activated, FC)]
    if read_elsewhere:
        outputs.append(graph.node("Neg", activated, output="negated"))
    model = graph.model(*outputs)
    fused = approximation == "tanh" and not read_elsewhere
    machine = PLUGIN_TARGETS["orin"]
    waist, _ = run_passes(model, WAIST_PASSES, machine)
    found = kinds(run_passes(waist, PLUGIN_PASSES, machine)[0])
    assert ("GeluQuantize" in found, "Gelu" in found) == (fused, not fused)
    assert _agrees(model)
