"""Layers that read the same tensor share its quantizer; nothing else is merged."""

from __future__ import annotations

import numpy as np

from exporter.passes import run_passes, share_activation_quantizers
from exporter.targets import TARGETS
from plugins.op import attach_functions
from tests.exporter.passes.waist_graphs import WaistGraph, make_weight, op_types, run, tokens

CPU = TARGETS["cpu"]


def test_q_k_v_share_one_quantizer() -> None:
    waist = WaistGraph()
    outputs = [waist.linear("x", make_weight(name)) for name in ("q", "k", "v")]
    before = waist.model(*outputs)
    model, (result,) = run_passes(before, (share_activation_quantizers,), CPU)
    assert result.changed == 4
    kinds = op_types(model)
    assert kinds.count("FloatQuantizeOnline_e2m3") == kinds.count("FloatDequantize_values") == 1
    quantizer = next(node for node in model.graph.node if node.op_type == "FloatQuantizeOnline_e2m3")
    assert next(a.s for a in quantizer.attribute if a.name == "layer") == b"q"
    for old, new in zip(run(before, tokens()), run(model, tokens()), strict=True):
        assert np.array_equal(old, new)


def test_running_twice_changes_nothing_more() -> None:
    waist = WaistGraph()
    model, _ = run_passes(
        waist.model(*[waist.linear("x", make_weight(name)) for name in ("q", "k")]), (share_activation_quantizers,), CPU
    )
    again, (result,) = run_passes(model, (share_activation_quantizers,), CPU)
    assert result.changed == 0
    assert op_types(again) == op_types(model)


def test_other_tensors_and_other_formats_keep_their_own() -> None:
    waist = WaistGraph()
    other = waist.node("Abs", "x", output="other")
    outputs = [
        waist.linear("x", make_weight("a"), "e2m3"),
        waist.linear("x", make_weight("b"), "e4m3"),
        waist.linear(other, make_weight("c"), "e2m3"),
    ]
    before = waist.model(*outputs)
    model, (result,) = run_passes(before, (share_activation_quantizers,), CPU)
    assert result.changed == 0
    assert op_types(model) == op_types(before)


def test_quantizers_along_other_axes_keep_their_own() -> None:
    waist = WaistGraph()
    before = waist.model(*[waist.linear("x", make_weight(name)) for name in ("q", "k")])
    second = [node for node in before.graph.node if node.op_type.startswith("FloatQuantizeOnline")][1]
    next(a for a in second.attribute if a.name == "axis").i = 1
    attach_functions(before)
    _, (result,) = run_passes(before, (share_activation_quantizers,), CPU)
    assert result.changed == 0
