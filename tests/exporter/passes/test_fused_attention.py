"""Attention becomes one operator that computes the same, and only where it is what it looks like."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.passes import run_passes
from exporter.passes.fused_attention import fuse_attention
from exporter.runtime import OnnxSession
from exporter.targets import TARGETS

CPU = TARGETS["cpu"]
HEADS, WIDTH = 3, 8
FEATURES = HEADS * WIDTH


@dataclass(frozen=True)
class Case:
    """An attention as torch.onnx writes it, after the waist's passes have tidied it."""

    queries: int = 7
    keys: int = 7
    mask_rows: int | None = None
    key_permutation: tuple[int, ...] = (0, 2, 3, 1)
    output_permutation: tuple[int, ...] = (0, 2, 1, 3)
    axis: int = -1
    show: str | None = None
    key_batch: str | int = "b"
    normalized: bool = False


def _model(case: Case) -> onnx.ModelProto:
    nodes, initializers = [], []

    def node(op: str, *inputs: str, output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(name: str, array: object) -> str:
        initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def split(x: str, tokens: int, permutation: tuple[int, ...]) -> str:
        shape = constant(f"{x}.shape", np.array([-1, tokens, HEADS, WIDTH], np.int64))
        return node("Transpose", node("Reshape", x, shape, output=f"{x}.split"), output=f"{x}.heads", perm=permutation)

    def normalized(x: str) -> str:
        scale = constant(f"{x}.scale", np.linspace(0.5, 2, WIDTH, dtype=np.float32))
        return node("LayerNormalization", x, scale, output=f"{x}.norm") if case.normalized else x

    queries = normalized(split("q", case.queries, (0, 2, 1, 3)))
    query = node("Mul", queries, constant("c", np.float32(WIDTH**-0.5)), output="q.scaled")
    keys = normalized(split("k", case.keys, case.key_permutation))
    if case.key_permutation != (0, 2, 3, 1):
        keys = node("Transpose", keys, output="k.turned", perm=(0, 1, 3, 2))
    scores = node("MatMul", query, keys, output="scores")
    if case.mask_rows is not None:
        scores = node("Add", scores, "mask", output="masked")
    weights = node("Softmax", scores, output="weights", axis=case.axis)
    values = node("MatMul", weights, split("v", case.keys, (0, 2, 1, 3)), output="weighted")
    turned = node("Transpose", values, output="turned", perm=case.output_permutation)
    node("Reshape", turned, constant("merged", np.array([-1, case.queries, FEATURES], np.int64)), output="y")
    sizes = {"q": case.queries, "k": case.keys, "v": case.keys}
    batches = {"q": "b", "k": case.key_batch, "v": case.key_batch}
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [batches[n], t, FEATURES]) for n, t in sizes.items()]
    if case.mask_rows is not None:
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["b", 1, case.mask_rows, case.keys]))
    ranks = {"y": 3, case.show: 4}
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * r) for n, r in ranks.items() if n]
    graph = helper.make_graph(nodes, "attention", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _feeds(case: Case, batch: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {"q": case.queries, "k": case.keys, "v": case.keys}
    feeds = {name: rng.standard_normal((batch, tokens, FEATURES)).astype(np.float32) for name, tokens in sizes.items()}
    if case.mask_rows is not None:
        mask = rng.random((batch, 1, case.mask_rows, case.keys)) < 0.3
        feeds["mask"] = np.where(mask, np.float32(-10000), np.float32(0))
    return feeds


def _fuse(case: Case, target: str = "cpu") -> tuple[onnx.ModelProto, int]:
    model, (result,) = run_passes(_model(case), (fuse_attention,), TARGETS[target])
    return model, result.changed


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", [Case(), Case(keys=4), Case(keys=5, mask_rows=1), Case(key_permutation=(0, 2, 1, 3))])
def test_the_operator_computes_what_the_nodes_did(case: Case, batch: int) -> None:
    fused, changed = _fuse(case)
    kinds = [node.op_type for node in fused.graph.node]
    assert changed == 1
    assert kinds == (["Expand"] if case.mask_rows else []) + ["MultiHeadAttention"]
    feeds = _feeds(case, batch)
    expected, found = (OnnxSession(model).run(feeds)["y"] for model in (_model(case), fused))
    assert np.abs(found - expected).max() < 1e-6


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mask_rows", [None, 1])
def test_normalized_heads_are_merged_for_the_operator(batch: int, mask_rows: int | None) -> None:
    case = Case(keys=5, mask_rows=mask_rows, key_permutation=(0, 2, 1, 3), normalized=True)
    fused, changed = _fuse(case)
    kinds = [node.op_type for node in fused.graph.node]
    assert changed == 1
    assert (kinds.count("MultiHeadAttention"), kinds.count("MatMul"), kinds.count("Softmax")) == (1, 0, 0)
    feeds = _feeds(case, batch)
    expected, found = (OnnxSession(model).run(feeds)["y"] for model in (_model(case), fused))
    assert np.abs(found - expected).max() < 1e-6


@pytest.mark.parametrize(
    "case",
    [
        Case(mask_rows=7),
        Case(output_permutation=(0, 1, 2, 3), queries=HEADS, keys=HEADS),
        Case(axis=2),
        Case(key_batch=1),
        Case(show="weights"),
        Case(show="scores"),
        Case(show="turned"),
    ],
    ids=[
        "mask with a row per query",
        "heads not merged",
        "other axis",
        "keys of one batch",
        "weights",
        "scores",
        "turned",
    ],
)
def test_must_not_fire(case: Case) -> None:
    fused, changed = _fuse(case)
    assert changed == 0
    assert "MultiHeadAttention" not in {node.op_type for node in fused.graph.node}


def test_tensorrt_keeps_the_parts() -> None:
    assert _fuse(Case(), "rtx-sm89")[1] == 0


def test_running_it_again_changes_nothing() -> None:
    fused, _ = _fuse(Case())
    again, (result,) = run_passes(fused, (fuse_attention,), CPU)
    assert result.changed == 0
    assert [node.op_type for node in again.graph.node] == ["MultiHeadAttention"]


def test_blocks_share_the_widened_mask() -> None:
    case = Case(keys=5, mask_rows=1)
    one, other = _model(case), _model(case)
    prefixed = onnx.compose.add_prefix(other, "second.", rename_inputs=False, rename_initializers=True)
    one.graph.node.extend(prefixed.graph.node)
    one.graph.initializer.extend(prefixed.graph.initializer)
    one.graph.output.extend(prefixed.graph.output)
    fused, (result,) = run_passes(one, (fuse_attention,), CPU)
    assert result.changed == 2
    assert [node.op_type for node in fused.graph.node].count("Expand") == 1


def test_attentions_with_other_numbers_of_queries_have_masks_of_their_own() -> None:
    cases = (Case(queries=7, keys=5, mask_rows=1), Case(queries=3, keys=5, mask_rows=1))
    one, other = (_model(case) for case in cases)
    prefixed = onnx.compose.add_prefix(other, "second.", rename_inputs=True)
    for node in prefixed.graph.node:
        node.input[:] = ["mask" if name == "second.mask" else name for name in node.input]
    one.graph.node.extend(prefixed.graph.node)
    one.graph.initializer.extend(prefixed.graph.initializer)
    one.graph.input.extend(value for value in prefixed.graph.input if value.name != "second.mask")
    one.graph.output.extend(prefixed.graph.output)
    fused, (result,) = run_passes(one, (fuse_attention,), CPU)
    feeds = _feeds(cases[0]) | {f"second.{n}": a for n, a in _feeds(cases[1]).items() if n != "mask"}
    expected, found = (OnnxSession(model).run(feeds) for model in (one, fused))
    assert result.changed == 2
    assert all(np.abs(found[name] - expected[name]).max() < 1e-6 for name in ("y", "second.y"))


def test_types_behind_the_operator_stay_known() -> None:
    model = _model(replace(Case(), show=None))
    model.graph.node.append(helper.make_node("Relu", ["y"], ["z"], name="z"))
    model.graph.node.append(helper.make_node("Neg", ["z"], ["w"], name="w"))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [None] * 3))
    fused, _ = run_passes(model, (fuse_attention,), CPU)
    assert {info.name: info.type.tensor_type.elem_type for info in fused.graph.value_info}["z"] == TensorProto.FLOAT
