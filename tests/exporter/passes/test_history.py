"""The passes' history travels with the graph: appended by later runs, untouched by runs that change nothing."""

from __future__ import annotations

import onnx
import pytest

from exporter.errors import InputError
from exporter.passes import WAIST_PASSES, PassResult, lowering_passes, run_passes
from exporter.passes.history import IMPORTED, PASSES_KEY, read_pass_history
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import make_weight, one_linear

CPU = TARGETS["cpu"]


def test_the_history_grows_from_the_imported_graph_over_both_runs() -> None:
    source = one_linear(make_weight("fc"))
    waist, first = run_passes(source, WAIST_PASSES, CPU)
    lowered, second = run_passes(waist, lowering_passes(CPU), CPU)
    imported = PassResult(IMPORTED, 0, len(source.graph.node))
    assert read_pass_history(waist) == (imported, *first)
    assert read_pass_history(lowered) == (imported, *first, *second)
    assert read_pass_history(lowered)[-1].nodes == len(lowered.graph.node)


def test_a_run_that_changes_nothing_leaves_the_model_as_it_was() -> None:
    waist, _ = run_passes(one_linear(make_weight("fc")), WAIST_PASSES, CPU)
    again, results = run_passes(waist, WAIST_PASSES, CPU)
    assert len(results) == len(WAIST_PASSES)
    assert again == waist


def test_every_kept_graph_has_the_history_up_to_its_own_pass() -> None:
    kept: list[onnx.ModelProto] = []
    run_passes(one_linear(make_weight("fc")), WAIST_PASSES, CPU, lambda _name, _index, model: kept.append(model))
    assert [len(read_pass_history(model)) for model in kept] == [index + 2 for index in range(len(WAIST_PASSES))]


def test_a_model_without_history_has_an_empty_one() -> None:
    assert read_pass_history(onnx.ModelProto()) == ()


@pytest.mark.parametrize("text", ["[{]", '[{"name": "x"}]', '{"name": 1}', "3"])
def test_a_damaged_history_is_refused(text: str) -> None:
    model = onnx.ModelProto()
    onnx.helper.set_model_props(model, {PASSES_KEY: text})
    with pytest.raises(InputError, match=r"fp4export\.passes is damaged"):
        read_pass_history(model)
