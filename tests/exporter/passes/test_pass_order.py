"""A pass that comes too early says so; what has run is remembered in the graph's metadata."""

from __future__ import annotations

import pytest

from exporter.compute import Compute
from exporter.passes import (
    COMPUTE_PASSES,
    CPU_PASSES,
    HALF_PRODUCT_PASSES,
    PLUGIN_COMPUTE_PASSES,
    PLUGIN_PASSES,
    TENSORRT_PASSES,
    WAIST_PASSES,
    fold_scales,
    fuse_linear,
    lower_to_tensorrt,
    lowering_passes,
    run_passes,
)
from exporter.passes.history import read_pass_history
from exporter.passes.order import NEEDS, PassOrderError
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import WaistGraph, make_weight, one_linear

RTX = TARGETS["rtx-sm89"]


@pytest.mark.parametrize("compute", COMPUTE_PASSES)
@pytest.mark.parametrize("lowering", [CPU_PASSES, TENSORRT_PASSES, HALF_PRODUCT_PASSES])
def test_the_tuples_are_in_order(compute: str, lowering: tuple[object, ...]) -> None:
    names = [run.__name__ for run in (*WAIST_PASSES, *COMPUTE_PASSES[compute], *lowering)]
    for position, name in enumerate(names):
        assert set(NEEDS.get(name, ())) <= set(names[:position])
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("compute", COMPUTE_PASSES)
def test_plugins_passes_are_in_order(compute: Compute) -> None:
    passes = (*WAIST_PASSES, *lowering_passes(TARGETS["orin"].with_kernels("plugin"), compute))
    names = [run.__name__ for run in passes]
    for position, name in enumerate(names):
        assert set(NEEDS.get(name, ())) <= set(names[:position])
    assert len(set(names)) == len(names)


def test_every_pass_in_the_table_exists() -> None:
    compute = (one for some in (COMPUTE_PASSES, PLUGIN_COMPUTE_PASSES) for tuples in some.values() for one in tuples)
    passes = (
        *WAIST_PASSES,
        *CPU_PASSES,
        *TENSORRT_PASSES,
        *HALF_PRODUCT_PASSES,
        *PLUGIN_PASSES,
        *compute,
    )
    known = {run.__name__ for run in passes}
    assert {*NEEDS, *(name for names in NEEDS.values() for name in names)} <= known


@pytest.mark.parametrize("position", range(len(WAIST_PASSES)))
def test_leaving_out_a_needed_pass_is_an_error(position: int) -> None:
    left_out = WAIST_PASSES[position].__name__
    passes = (*WAIST_PASSES[:position], *WAIST_PASSES[position + 1 :], *lowering_passes(RTX, "fp16"))
    wanting = [run.__name__ for run in passes if left_out in NEEDS.get(run.__name__, ())]
    model = one_linear(make_weight("fc"))
    if not wanting:
        run_passes(model, passes, RTX)
        return
    with pytest.raises(PassOrderError, match=f"pass {wanting[0]} needs {left_out} to have run before it"):
        run_passes(model, passes, RTX)


def test_passes_of_an_earlier_run_count() -> None:
    fused, _ = run_passes(one_linear(make_weight("fc")), (fuse_linear,), RTX)
    folded, _ = run_passes(fused, (fold_scales,), RTX)
    assert [result.name for result in read_pass_history(folded)] == ["imported", "fuse_linear", "fold_scales"]


def test_a_graph_without_the_projects_operators_has_nothing_to_miss() -> None:
    waist = WaistGraph()
    assert run_passes(waist.model(waist.node("Neg", "x", output="y")), (lower_to_tensorrt,), RTX)[1][0].changed == 0
