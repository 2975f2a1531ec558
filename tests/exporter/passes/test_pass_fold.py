"""Group scales are folded exactly when the proof succeeds."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from exporter.passes import fold_scales, fuse_linear, run_passes
from exporter.passes.fold import fold_rows
from exporter.targets import TARGETS, Target
from plugins.containers import INT8, multipliers
from plugins.formats import get_format
from tests.exporter.passes.waist_graphs import Weight, make_weight, one_linear, op_types, run, snr_db, tokens

CPU = TARGETS["cpu"]


def _fold(weight: Weight, target: Target = CPU) -> tuple[onnx.ModelProto, onnx.ModelProto, int]:
    fused, _ = run_passes(one_linear(weight), (fuse_linear,), target)
    folded, (result,) = run_passes(fused, (fold_scales,), target)
    return fused, folded, result.changed


@pytest.mark.parametrize("weight_format", ["e2m1", "e1m2", "int4", "e3m0"])
def test_integer_multiples_are_folded(weight_format: str) -> None:
    before, after, changed = _fold(make_weight("fc", weight_format))
    assert changed == 1
    assert "_m_" in op_types(after)[-1]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    channel, groups = constants["fc.channel_scales"], constants["fc.multipliers"]
    assert channel.shape == (24, 1)
    assert set(groups.ravel()) <= set(multipliers(get_format(weight_format), INT8))
    assert np.array_equal(channel * groups.astype(np.float32), make_weight("fc", weight_format).scales)
    assert snr_db(run(before, tokens())[0], run(after, tokens())[0]) > 120


def test_free_group_scales_stay() -> None:
    before, after, changed = _fold(make_weight("fc", kind="group"))
    assert changed == 0
    assert op_types(after) == op_types(before)


def test_one_ulp_off_stays() -> None:
    weight = make_weight("fc")
    weight.scales[3, 1] = np.nextafter(weight.scales[3, 1], np.float32(1))
    assert _fold(weight)[2] == 0


def test_multiplier_that_the_container_does_not_hold_stays() -> None:
    weight = make_weight("fc")
    weight.scales[:] = weight.scales.min(axis=1, keepdims=True)
    weight.scales[0, 1] = weight.scales[0, 0] * 11
    assert _fold(weight)[2] == 0


def test_zero_scale_stays() -> None:
    weight = make_weight("fc")
    weight.scales[0, 1] = 0
    assert _fold(weight)[2] == 0


def test_fp8_multipliers_are_folded_where_the_target_has_fp8() -> None:
    weight = make_weight("fc")
    weight.scales[:] = weight.scales.min(axis=1, keepdims=True)
    weight.scales[0, 1] = weight.scales[0, 0] * 12
    assert _fold(weight, TARGETS["rtx-sm89"])[2] == 1
    assert _fold(weight, TARGETS["rtx-sm86"])[2] == 0


def test_one_group_a_row_is_a_channel() -> None:
    weight = make_weight("fc", group_size=64, kind="group")
    before, after, changed = _fold(weight)
    assert changed == 1
    assert op_types(after)[-1] == "FloatGemm_e2m1_e2m3_g0_k64_bias"
    assert snr_db(run(before, tokens())[0], run(after, tokens())[0]) > 120


def test_running_twice_changes_nothing_more() -> None:
    _, folded, _ = _fold(make_weight("fc"))
    assert run_passes(folded, (fold_scales,), CPU)[1][0].changed == 0


def test_scales_that_two_layers_share_are_folded_for_each() -> None:
    weight = make_weight("fc")
    model = one_linear(weight)
    fused, _ = run_passes(model, (fuse_linear, fold_scales), CPU)
    assert "fc.scales" in {tensor.name for tensor in model.graph.initializer}
    assert "fc.scales" not in {tensor.name for tensor in fused.graph.initializer}


@pytest.mark.parametrize("smallest", [1, 2, 3, 7])
def test_smallest_multiplier_need_not_be_one(smallest: int) -> None:
    base = np.float32(0.0078125 + 2**-20)
    groups = np.array([[smallest, smallest + 1, smallest + 3]], np.int32)
    factors = fold_rows(base * groups.astype(np.float32), range(1, 11))
    assert factors is not None
    assert np.array_equal(factors[1], groups)
    assert factors[0] == base


def test_every_row_may_start_elsewhere() -> None:
    groups = np.array([[1, 2, 3], [3, 5, 7], [4, 7, 10]], np.float32)
    factors = fold_rows(np.array([[1.0], [0.5], [0.25]], np.float32) * groups, range(1, 11))
    assert factors is not None
    assert np.array_equal(factors[0] * factors[1], np.array([[1.0], [0.5], [0.25]], np.float32) * groups)


def test_row_without_a_common_divisor_is_refused() -> None:
    assert fold_rows(np.array([[1, 2, 3], [1, np.pi, 3]], np.float32), range(1, 11)) is None
