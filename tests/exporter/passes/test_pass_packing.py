"""Codes become words, and mean the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from exporter.passes import fold_scales, fuse_linear, pack_weights, run_passes
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import WaistGraph, make_weight, one_linear, op_types, run, tokens

CPU = TARGETS["cpu"]


def _types(model: onnx.ModelProto) -> set[int]:
    return {tensor.data_type for tensor in model.graph.initializer}


@pytest.mark.parametrize("weight_format", ["e2m1", "e2m3", "int6", "e4m3"])
def test_fused_layers_are_packed(weight_format: str) -> None:
    fused, _ = run_passes(one_linear(make_weight("fc", weight_format, 0, "channel", count=44)), (fuse_linear,), CPU)
    packed, (result,) = run_passes(fused, (pack_weights,), CPU)
    assert result.changed == 1
    assert TensorProto.UINT8 not in _types(packed)
    assert "_packed" in op_types(packed)[-1]
    x = tokens(44)
    assert np.array_equal(run(fused, x)[0], run(packed, x)[0])


def test_folded_layers_and_lone_dequantizers_are_packed() -> None:
    folded, _ = run_passes(one_linear(make_weight("fc")), (fuse_linear, fold_scales), CPU)
    alone = one_linear(make_weight("fc"))
    for before in (folded, alone):
        after, (result,) = run_passes(before, (pack_weights,), CPU)
        assert result.changed == 1
        assert TensorProto.UINT8 not in _types(after)
        assert np.array_equal(run(before, tokens())[0], run(after, tokens())[0])


def test_shared_codes_become_shared_words() -> None:
    waist = WaistGraph()
    outputs = [waist.linear("x", make_weight(name)) for name in ("a", "b")]
    model = waist.model(*outputs)
    for node in model.graph.node:
        node.input[:] = ["a.codes" if name == "b.codes" else name for name in node.input]
    packed, (result,) = (
        run_passes(model, (fuse_linear, pack_weights), CPU)[0],
        run_passes(model, (pack_weights,), CPU)[1],
    )
    assert result.changed == 2
    assert [t.name for t in packed.graph.initializer if t.data_type == TensorProto.INT32] == ["a.words"]


def test_running_twice_changes_nothing_more() -> None:
    packed, _ = run_passes(one_linear(make_weight("fc")), (fuse_linear, pack_weights), CPU)
    assert run_passes(packed, (pack_weights,), CPU)[1][0].changed == 0
