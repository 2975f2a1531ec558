"""The driver: intermediates are valid, metadata survives, the source is left alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from exporter.errors import InputError
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.passes.layer_table import LAYERS_KEY, TARGET_KEY, read_layer_table
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import WaistGraph, make_weight, one_linear, op_types, run, snr_db, tokens


def _attention_like() -> onnx.ModelProto:
    """A block with shared, chained and weight-only layers, markers and a no-op Squeeze."""
    waist = WaistGraph()
    hidden = waist.boundary(waist.node("Abs", "x", output="a"), "blocks.0.input", "m0")
    q, k = (waist.linear(hidden, make_weight(f"blocks.0.{name}", features=64)) for name in ("q", "k"))
    mixed = waist.node("Add", q, k, output="mixed")
    out = waist.linear(mixed, make_weight("blocks.0.out", "e1m2", features=64), "none")
    squeezed = waist.node("Squeeze", out, waist.constant("axes", np.array([1], np.int64)), output="s")
    return waist.model(waist.node("Neg", waist.boundary(squeezed, "blocks.0.output", "m1"), output="y"))


@pytest.mark.parametrize("target", ["cpu", "rtx-sm86", "rtx-sm89"])
def test_every_intermediate_is_valid_and_computes_the_same(target: str) -> None:
    kept: list[tuple[str, int, onnx.ModelProto]] = []

    def keep(name: str, index: int, model: onnx.ModelProto) -> None:
        kept.append((name, index, model))

    passes = (*WAIST_PASSES, *lowering_passes(TARGETS[target]))
    final, results = run_passes(_attention_like(), passes, TARGETS[target], keep)
    assert [name for name, _, _ in kept] == [run.__name__ for run in passes] == [result.name for result in results]
    assert [index for _, index, _ in kept] == list(range(1, len(passes) + 1))
    expected = run(kept[0][2], tokens())[0]
    for _, _, model in kept:
        onnx.checker.check_model(model, full_check=True)
        assert snr_db(expected, run(model, tokens())[0]) > 100
    assert final == kept[-1][2]


def test_source_model_is_not_changed() -> None:
    model = _attention_like()
    before = model.SerializeToString(deterministic=True)
    run_passes(model, (*WAIST_PASSES, *lowering_passes(TARGETS["cpu"])), TARGETS["cpu"])
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("target", ["cpu", "rtx-sm86"])
def test_passes_on_their_own_result_change_nothing(target: str) -> None:
    model = _attention_like()
    for passes in (WAIST_PASSES, lowering_passes(TARGETS[target])):
        model, first = run_passes(model, passes, TARGETS[target])
        _, second = run_passes(model, passes, TARGETS[target])
        assert any(result.changed for result in first)
        assert [result.changed for result in second] == [0] * len(passes)


def test_two_runs_give_the_same_bytes() -> None:
    runs = [run_passes(_attention_like(), WAIST_PASSES, TARGETS["cpu"])[0] for _ in range(2)]
    assert runs[0].SerializeToString(deterministic=True) == runs[1].SerializeToString(deterministic=True)


def test_versions_metadata_and_function_bodies() -> None:
    model = _attention_like()
    onnx.helper.set_model_props(model, {"author": "someone"})
    waist, _ = run_passes(model, WAIST_PASSES, TARGETS["cpu"])
    assert waist.ir_version == 10
    assert {entry.domain: entry.version for entry in waist.opset_import} == {"": 21, "fp4export": 1}
    used = {node.op_type for node in waist.graph.node if node.domain == "fp4export"}
    assert {function.name for function in waist.functions} == used
    properties = {entry.key: entry.value for entry in waist.metadata_props}
    assert properties["author"] == "someone"
    assert properties[TARGET_KEY] == "cpu"
    lowered, _ = run_passes(waist, lowering_passes(TARGETS["cpu"]), TARGETS["cpu"])
    assert not lowered.functions
    assert {entry.domain for entry in lowered.opset_import} == {""}
    assert [entry.layer for entry in read_layer_table(lowered)] == ["blocks.0.q", "blocks.0.k", "blocks.0.out"]


def test_layer_table_names_tensors_of_the_lowered_graph() -> None:
    for target in ("cpu", "rtx-sm89"):
        model, _ = run_passes(_attention_like(), (*WAIST_PASSES, *lowering_passes(TARGETS[target])), TARGETS[target])
        known = {name for node in model.graph.node for name in node.output}
        for entry in read_layer_table(model):
            assert {entry.input, entry.output} <= known
            assert entry.activation_format == "none" or {entry.values, entry.token_scales} <= known


def test_shapes_are_fresh() -> None:
    model, _ = run_passes(_attention_like(), (*WAIST_PASSES, *lowering_passes(TARGETS["cpu"])), TARGETS["cpu"])
    types = {info.name: info.type.tensor_type.elem_type for info in model.graph.value_info}
    assert types["blocks.0.q.values"] == onnx.TensorProto.UINT8
    assert set(types) <= {name for node in model.graph.node for name in node.output}


def test_constant_nodes_become_initializers() -> None:
    waist = WaistGraph()
    tensor = onnx.numpy_helper.from_array(np.array([0.5], np.float32), "half")
    half = waist.node("Constant", output="half", value=tensor)
    model, _ = run_passes(waist.model(waist.node("Mul", "x", half, output="y")), (), TARGETS["cpu"])
    assert op_types(model) == ["Mul"]
    assert np.array_equal(run(model, tokens())[0], tokens() * np.float32(0.5))


@pytest.mark.parametrize("version", [18, 24])
def test_unknown_operator_version_is_refused(version: int) -> None:
    model = one_linear(make_weight("fc"))
    next(entry for entry in model.opset_import if not entry.domain).version = version
    with pytest.raises(InputError, match=f"version {version}"):
        run_passes(model, WAIST_PASSES, TARGETS["cpu"])


def _damage_text(_text: str) -> str:
    return "[{]"


def _damage_fields(_text: str) -> str:
    return '[{"layer": "fc"}]'


def _damage_kind(_text: str) -> str:
    return "3"


@pytest.mark.parametrize("damage", [_damage_text, _damage_fields, _damage_kind])
def test_damaged_layer_table_is_refused(damage: Callable[[str], str]) -> None:
    model, _ = run_passes(one_linear(make_weight("fc")), WAIST_PASSES, TARGETS["cpu"])
    entry = next(entry for entry in model.metadata_props if entry.key == LAYERS_KEY)
    entry.value = damage(entry.value)
    with pytest.raises(InputError, match=r"fp4export\.layers is damaged"):
        read_layer_table(model)


def test_model_without_layers_has_an_empty_table() -> None:
    assert read_layer_table(onnx.ModelProto()) == ()
