"""Constants that FP16 holds exactly take half the bytes; not one bit changes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from exporter.passes import run_passes, store_exactly_in_half
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import WaistGraph, make_weight, op_types, run, tokens

CPU = TARGETS["cpu"]


def _product(array: np.ndarray) -> onnx.ModelProto:
    waist = WaistGraph()
    return waist.model(waist.node("Mul", "x", waist.constant("c", array), output="y"))


def _exact(count: int = 320) -> np.ndarray:
    halves = np.random.default_rng(0).standard_normal(count).astype(np.float16)
    halves[:3] = [-0.0, 65504, 2**-24]
    return halves.astype(np.float32).reshape(5, -1)


def test_exact_constant_is_halved_and_gives_the_same_bits() -> None:
    before = _product(_exact())
    after, (result,) = run_passes(before, (store_exactly_in_half,), CPU)
    assert result.changed == 1
    assert op_types(after) == ["Cast", "Mul"]
    assert [tensor.data_type for tensor in after.graph.initializer] == [TensorProto.FLOAT16]
    old, new = run(before, tokens())[0], run(after, tokens())[0]
    assert np.array_equal(old.view(np.int32), new.view(np.int32))


@pytest.mark.parametrize("value", [1 + 2**-11, 65536.0, 2**-25])
def test_one_value_that_would_change_keeps_all(value: float) -> None:
    array = _exact()
    array[0, 7] = value
    after, (result,) = run_passes(_product(array), (store_exactly_in_half,), CPU)
    assert result.changed == 0
    assert op_types(after) == ["Mul"]


def test_small_constants_integers_and_our_own_operators_stay() -> None:
    waist = WaistGraph()
    y = waist.linear("x", make_weight("fc", features=320, bias=False))
    y = waist.node("Mul", y, waist.constant("small", np.float32(0.5)), output="y")
    after, (result,) = run_passes(waist.model(y), (store_exactly_in_half,), CPU)
    assert result.changed == 0
    assert "Cast" not in op_types(after)


def test_engines_store_their_own_constants() -> None:
    assert run_passes(_product(_exact()), (store_exactly_in_half,), TARGETS["rtx-sm89"])[1][0].changed == 0


def test_running_twice_changes_nothing_more() -> None:
    once, _ = run_passes(_product(_exact()), (store_exactly_in_half,), CPU)
    assert run_passes(once, (store_exactly_in_half,), CPU)[1][0].changed == 0
