"""The gate finds inside the kernels what the waist had between its operators."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.compute import Compute
from exporter.layer_entries import read_layer_table
from plugins.op import is_ours
from tests.exporter.passes.plugins.plugin_graphs import PluginGraph, kinds, lowered, opened
from tests.exporter.passes.waist_graphs import make_weight, reference, run, snr_db, tokens

FC = make_weight("fc", features=64)
SECOND = make_weight("second", features=64)


def _fused() -> PluginGraph:
    """Norm, linear, GELU, linear, gate and residual: three kernels keep tensors of layers to themselves."""
    graph = PluginGraph()
    y = graph.linear(graph.modulated("x", graph.row("a"), graph.row("b")), FC)
    hidden = graph.node("Gelu", y, output="hidden", approximate="tanh")
    gated = graph.node("Mul", graph.per_sample("x", "gate"), graph.linear(hidden, SECOND), output="gated")
    graph.node("Add", "x", gated, output="sum")
    return graph


@pytest.mark.parametrize("compute", ["fp32", "fp16", "bf16"])
def test_every_tensor_of_the_table_is_in_the_opened_graph(compute: Compute) -> None:
    model = lowered(_fused().model("sum"), compute=compute)
    assert [kind for kind in kinds(model) if kind not in ("Cast", "ReduceMean")] == [
        "NormQuantize",
        "PackedLinear",
        "GeluQuantize",
        "PackedLinear",
    ]
    plain = opened(model)
    assert not any(is_ours(node) for node in plain.graph.node)
    made = {name for node in plain.graph.node for name in node.output}
    table = read_layer_table(plain)
    assert [entry.layer for entry in table] == ["fc", "second"]
    for entry in table:
        assert {entry.input, entry.values, entry.token_scales, entry.output} <= made
    closed = {name for node in model.graph.node for name in node.output}
    assert not {"fc.input", "second.input", "second.output"} & closed


def test_the_opened_graph_has_the_lowered_ones_numbers() -> None:
    model = lowered(_fused().model("sum"))
    assert np.array_equal(run(model, tokens())[0], run(opened(model), tokens())[0])


def test_what_is_inside_is_what_the_layers_compute() -> None:
    plain = opened(lowered(_fused().model("sum")))
    table = {entry.layer: entry for entry in read_layer_table(plain)}
    names = [getattr(table[layer], what) for layer in ("fc", "second") for what in ("input", "output")]
    _, *found = run(plain, tokens(), *names)
    for weight, x, y in ((FC, *found[:2]), (SECOND, *found[2:])):
        assert snr_db(reference(x, weight, "e2m3")[1], y) > 110


@pytest.mark.parametrize("compute", ["fp32", "fp16", "bf16"])
def test_a_block_between_two_plugins_is_read_in_float32(compute: Compute) -> None:
    """The body that makes it ends with a Cast and the one that reads it begins with one."""
    graph = _fused()
    third = make_weight("third", features=64)
    model = graph.model(graph.linear(graph.boundary("sum", "blocks.0.output", "marked"), third))
    plain = opened(lowered(model, compute=compute))
    _, block = run(plain, tokens(), "blocks.0.output")
    (expected,) = run(_fused().model("sum"), tokens())
    assert block.dtype == np.float32
    assert snr_db(expected, block) > 30
