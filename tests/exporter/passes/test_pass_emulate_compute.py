"""The stand-in rounds wherever the engine stores a number, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from exporter.compute import COMPUTE_TYPES, Compute
from exporter.passes import COMPUTE_PASSES, run_passes
from exporter.passes.emulate import EMULATION_PASSES, emulation_passes
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import WaistGraph, op_types, run, tokens

RTX = TARGETS["rtx-sm89"]
BOTH = pytest.mark.parametrize("compute", ["fp16", "bf16"])


def _chain(factor: float = 1 / 3) -> onnx.ModelProto:
    waist = WaistGraph()
    scaled = waist.node("Mul", "x", waist.constant("factor", np.float32(factor)), output="scaled")
    moved = waist.node("Transpose", scaled, output="moved", perm=[0, 2, 1])
    return waist.model(waist.node("Add", moved, moved, output="y"))


def _emulated(model: onnx.ModelProto, compute: Compute) -> onnx.ModelProto:
    low, _ = run_passes(model, COMPUTE_PASSES[compute], RTX)
    return run_passes(low, EMULATION_PASSES, RTX)[0]


@BOTH
def test_every_result_is_rounded_as_numpy_rounds_it(compute: Compute) -> None:
    rounded = COMPUTE_TYPES[compute].rounded
    scaled = rounded(rounded(tokens()) * rounded(np.float32(1 / 3)))
    expected = rounded(scaled + scaled).transpose(0, 2, 1)
    assert np.array_equal(run(_emulated(_chain(), compute), tokens())[0], expected)


@BOTH
def test_only_results_are_rounded_and_all_arithmetic_is_fp32(compute: Compute) -> None:
    model = _emulated(_chain(), compute)
    assert (
        op_types(model).count("Cast") == 2 + 2 + 2 + 1
    )  # input, product and sum; and the output's, which does nothing
    low = {node.output[0] for node in model.graph.node if node.op_type == "Cast"} & {
        info.name for info in model.graph.value_info if info.type.tensor_type.elem_type != TensorProto.FLOAT
    }
    assert all(node.op_type == "Cast" for node in model.graph.node if low.intersection(node.input))


def test_an_overflow_of_fp16_is_infinite_and_bf16_has_none() -> None:
    assert np.isinf(run(_emulated(_chain(3e4), "fp16"), tokens())[0]).any()
    assert np.isfinite(run(_emulated(_chain(3e4), "bf16"), tokens())[0]).all()


@BOTH
def test_running_twice_changes_nothing_more(compute: Compute) -> None:
    once = _emulated(_chain(), compute)
    again, results = run_passes(once, EMULATION_PASSES, RTX)
    assert [result.changed for result in results] == [0] * len(EMULATION_PASSES)
    assert op_types(again) == op_types(once)


def test_an_fp32_graph_is_left_alone_and_onnx_runtime_needs_no_stand_in() -> None:
    assert not any(result.changed for result in run_passes(_chain(), EMULATION_PASSES, RTX)[1])
    assert emulation_passes(TARGETS["cpu"]) == ()
