"""The operators' names, and the function bodies a model carries."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import helper

from plugins.body import OpsetError
from plugins.formats import UnknownFormatError
from plugins.op import (
    DOMAIN,
    OPSET_VERSION,
    Boundary,
    DequantizeValues,
    DequantizeWeight,
    FakeQuantize,
    Gemm,
    OnlineQuantize,
    Quantize,
    UnknownOperatorError,
    Variant,
    attach_functions,
    function_for,
    functions_for,
    is_ours,
    parse,
)
from plugins.weight import GroupError

NAMES: list[tuple[Variant, str]] = [
    (OnlineQuantize("e2m3"), "FloatQuantizeOnline_e2m3"),
    (Quantize("e4m3"), "FloatQuantize_e4m3"),
    (FakeQuantize("e4m3"), "FloatFakeQuantize_e4m3"),
    (FakeQuantize("int8", 72), "FloatFakeQuantize_int8_g72"),
    (DequantizeValues(), "FloatDequantize_values"),
    (DequantizeWeight("e2m1", 0, 1152, packed=False), "FloatDequantize_e2m1_g0_k1152"),
    (DequantizeWeight("e2m3", 128, 1152, packed=True), "FloatDequantize_e2m3_g128_k1152_packed"),
    (Gemm("e2m1", "e2m3", 0, 64, False, False, False), "FloatGemm_e2m1_e2m3_g0_k64"),
    (Gemm("e2m1", "e2m3", 32, 64, True, True, True), "FloatGemm_e2m1_e2m3_g32_k64_m_packed_bias"),
    (Gemm("e1m2", "none", 32, 64, False, False, True), "FloatGemm_e1m2_none_g32_k64_bias"),
    (Boundary(), "FloatBoundary"),
]


@pytest.mark.parametrize(("variant", "name"), NAMES, ids=[name for _, name in NAMES])
def test_names_round_trip(variant: Variant, name: str) -> None:
    assert variant.op_type == name
    assert parse(name) == variant
    function = function_for(name)
    assert (function.name, function.domain) == (name, DOMAIN)
    assert tuple(function.input) == variant.input_names
    assert tuple(function.output) == variant.output_names


@pytest.mark.parametrize(("variant", "name"), NAMES, ids=[name for _, name in NAMES])
def test_bodies_hold_nothing_that_a_target_refuses(variant: Variant, name: str) -> None:
    """No bit operations, no control flow, no other domain, every attribute of the node declared."""
    function = variant.function()
    forbidden = {"If", "Loop", "Scan", "BitShift", "MatMulInteger", "DynamicQuantizeLinear"}
    for node in function.node:
        assert node.domain == ""
        assert node.op_type not in forbidden
        assert not node.op_type.startswith("Bitwise")
    key = "name" if isinstance(variant, Boundary) else "layer"
    assert list(function.attribute) == list(variant.attributes(**{key: "anything"}))


@pytest.mark.parametrize(
    ("op_type", "error", "message"),
    [
        ("QuantizeLinear", UnknownOperatorError, "'QuantizeLinear' is no operator of domain 'fp4export' 1"),
        ("FloatGemm_e2m1_e2m3_g0", UnknownOperatorError, "is no operator"),
        ("FloatGemm_e2m1_e2m3_g0_k64_bias_packed", UnknownOperatorError, "is no operator"),
        ("FloatQuantizeOnline", UnknownOperatorError, "is no operator"),
        ("FloatFakeQuantize_e4m3_g0", UnknownOperatorError, "is no operator"),
        ("FloatQuantizeOnline_e2m4", UnknownFormatError, "did you mean 'e2m3'"),
        ("FloatDequantize_e2m2_g0_k64", UnknownFormatError, "did you mean 'e2m[13]'"),
        ("FloatGemm_e2m1_e2m3_g48_k64", GroupError, "do not divide 64"),
    ],
)
def test_wrong_names_say_what_is_wrong(op_type: str, error: type[ValueError], message: str) -> None:
    with pytest.raises(error, match=message):
        parse(op_type)


def test_functions_are_given_once_and_in_order() -> None:
    functions = functions_for(["FloatBoundary", "FloatDequantize_values", "FloatBoundary"])
    assert [function.name for function in functions] == ["FloatBoundary", "FloatDequantize_values"]


def test_the_same_variant_gives_the_same_bytes() -> None:
    name = "FloatGemm_e2m1_e2m3_g32_k64_m_packed_bias"
    assert function_for(name).SerializeToString(True) == function_for(name).SerializeToString(True)


def test_is_ours_takes_nodes_of_both_libraries() -> None:
    assert is_ours(helper.make_node("FloatBoundary", ["x"], ["y"], domain=DOMAIN))
    assert is_ours(gs.Node("FloatBoundary", domain=DOMAIN))
    assert not is_ours(helper.make_node("Add", ["x", "x"], ["y"]))
    assert not is_ours(gs.Node("Add"))


def marked_model(opset: int = 21) -> onnx.ModelProto:
    """x → marker → If(flag, marker, marker): one node of the domain outside, two in subgraphs."""
    marker = Boundary()

    def branch(name: str) -> onnx.GraphProto:
        node = helper.make_node(marker.op_type, ["y"], [name], domain=DOMAIN)
        # Not as keywords: make_node would take the attribute `name` for the node's own name.
        node.attribute.extend(helper.make_attribute(key, value) for key, value in marker.attributes(name).items())
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, 1, [2])])

    nodes = [
        helper.make_node("OnlyHere", ["x"], ["y"], domain="elsewhere"),
        helper.make_node("If", ["flag"], ["z"], then_branch=branch("then"), else_branch=branch("else")),
    ]
    inputs = [helper.make_tensor_value_info("x", 1, [2]), helper.make_tensor_value_info("flag", 9, [])]
    graph = helper.make_graph(nodes, "graph", inputs, [helper.make_tensor_value_info("z", 1, [2])])
    other = helper.make_function(
        "elsewhere", "OnlyHere", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], [helper.make_opsetid("", opset)]
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("elsewhere", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=[other], ir_version=10)


def imports_of(model: onnx.ModelProto) -> dict[str, int]:
    return {entry.domain: entry.version for entry in model.opset_import}


def test_attached_functions_run_inside_subgraphs(run_model: Callable[..., list[np.ndarray]]) -> None:
    model = marked_model()
    attach_functions(model)
    onnx.checker.check_model(model)
    x = np.array([1.0, -2.0], np.float32)
    [z] = run_model(model, {"x": x, "flag": np.array(True)})
    assert np.array_equal(z, -x)


def test_attaching_adds_drops_and_keeps() -> None:
    model = marked_model()
    model.functions.append(function_for("FloatDequantize_values"))
    attach_functions(model)
    assert {function.name for function in model.functions} == {"OnlyHere", "FloatBoundary"}
    assert imports_of(model) == {"": 21, "elsewhere": 1, DOMAIN: OPSET_VERSION}
    once = model.SerializeToString(True)
    attach_functions(model)
    assert model.SerializeToString(True) == once


def test_a_model_without_our_nodes_loses_the_import() -> None:
    model = marked_model()
    attach_functions(model)
    del model.graph.node[1]
    attach_functions(model)
    assert [function.name for function in model.functions] == ["OnlyHere"]
    assert imports_of(model) == {"": 21, "elsewhere": 1}


def test_nodes_inside_other_functions_count() -> None:
    model = marked_model()
    del model.graph.node[1]
    model.functions[0].node[0].CopyFrom(helper.make_node("FloatDequantize_values", ["a", "a"], ["b"], domain=DOMAIN))
    attach_functions(model)
    assert "FloatDequantize_values" in {function.name for function in model.functions}


@pytest.mark.parametrize("opset", [18, 22])
def test_bodies_take_the_models_opset(opset: int) -> None:
    model = marked_model(opset)
    attach_functions(model)
    onnx.checker.check_model(model)
    assert {entry.version for function in model.functions for entry in function.opset_import} == {opset}


def test_unknown_nodes_and_old_models_are_refused() -> None:
    model = marked_model()
    model.graph.node.append(helper.make_node("FloatSoftmax_e2m1", ["x"], ["w"], domain=DOMAIN))
    with pytest.raises(UnknownOperatorError, match="FloatSoftmax_e2m1"):
        attach_functions(model)
    with pytest.raises(OpsetError, match="need opset 18 or later, not 17"):
        attach_functions(marked_model(17))
