"""Finding linear layers: every form in which exporters write one, and what is none."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.onnx_input.linears import FoundLinear, find_linears
from exporter.passes.driver import import_graph
from tests.exporter.onnx_input.models import WIDTH, HandMade, matmul_and_add


def found_in(model: onnx.ModelProto) -> list[FoundLinear]:
    return find_linears(import_graph(model))


def array(model: onnx.ModelProto, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return numpy_helper.to_array(tensor).astype(np.float32)


def test_matmul_and_add_is_one_layer_named_by_its_weight() -> None:
    model = matmul_and_add("blocks.0.fc")
    (linear,) = found_in(model)
    assert (linear.name, linear.out_features, linear.in_features) == ("blocks.0.fc", 32, WIDTH)
    assert np.array_equal(linear.weight(), array(model, "blocks.0.fc.weight").T)
    assert np.array_equal(linear.bias_values(), array(model, "blocks.0.fc.bias"))
    assert linear.y.name == "y"
    assert linear.refusal == ""


@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm_with_its_factors(trans_b: int) -> None:
    made = HandMade(rank=2)
    shape = (32, WIDTH) if trans_b else (WIDTH, 32)
    inputs = ["x", made.random("fc.weight", *shape), made.random("fc.bias", 1, 32)]
    model = made.model(made.node("Gemm", *inputs, output="y", transB=trans_b, alpha=2.0, beta=0.5))
    (linear,) = found_in(model)
    stored = array(model, "fc.weight")
    assert np.array_equal(linear.weight(), 2 * (stored if trans_b else stored.T))
    assert np.array_equal(linear.bias_values(), 0.5 * array(model, "fc.bias")[0])


@pytest.mark.parametrize("shape", [(1,), (), (1, 1)])
def test_a_gemm_s_single_number_is_a_bias_of_every_feature(shape: tuple[int, ...]) -> None:
    made = HandMade(rank=2)
    model = made.model(made.node("Gemm", "x", made.random("w", WIDTH, 32), made.random("b", *shape), output="y"))
    (linear,) = found_in(model)
    assert np.array_equal(linear.bias_values(), np.full(32, array(model, "b").item(), np.float32))


def test_a_weight_behind_casts_transposes_and_identities() -> None:
    made = HandMade()
    stored = made.random("fc.weight", 32, WIDTH, kind=TensorProto.BFLOAT16)
    full = made.node("Cast", made.node("Identity", stored, output="i"), output="f", to=TensorProto.FLOAT)
    model = made.model(made.node("MatMul", "x", made.node("Transpose", full, output="t"), output="y"))
    (linear,) = found_in(model)
    assert np.array_equal(linear.weight(), array(model, "fc.weight"))
    assert (linear.element_type, linear.out_features) == (TensorProto.FLOAT, 32)


def test_a_cast_to_half_rounds_the_weight() -> None:
    made = HandMade(kind=TensorProto.FLOAT16)
    half = made.node("Cast", made.random("w", WIDTH, 8, kind=TensorProto.FLOAT), output="h", to=TensorProto.FLOAT16)
    model = made.model(made.node("MatMul", "x", half, output="y"))
    (linear,) = found_in(model)
    assert np.array_equal(linear.weight(), array(model, "w").T.astype(np.float16).astype(np.float32))


def test_a_constant_node_is_a_weight() -> None:
    made = HandMade()
    tensor = numpy_helper.from_array(np.ones((WIDTH, 8), np.float32), "value")
    weight = made.node("Constant", output="fc.weight", value=tensor)
    (linear,) = found_in(made.model(made.node("MatMul", "x", weight, output="y")))
    assert (linear.name, linear.out_features) == ("fc", 8)


def test_products_of_activations_and_of_constants_are_none() -> None:
    made = HandMade()
    turned = made.node("Transpose", "x", output="t", perm=[0, 2, 1])
    scores = made.node("MatMul", "x", turned, output="scores")
    folded = made.node("MatMul", made.random("a", 6, 4), made.random("b", 4, 6), output="ab")
    assert found_in(made.model(made.node("Add", scores, folded, output="y"))) == []


@pytest.mark.parametrize(
    ("shape", "reason"), [((2, WIDTH, 8), "its weight has 3 axes, not 2"), ((WIDTH,), "its weight has 1 axes, not 2")]
)
def test_constants_that_are_no_matrix_are_refused(shape: tuple[int, ...], reason: str) -> None:
    made = HandMade(rank=3 if len(shape) > 1 else 2)
    (linear,) = found_in(made.model(made.node("MatMul", "x", made.random("w", *shape), output="y")))
    assert linear.refusal == reason


def test_left_factors_doubles_and_quantized_weights_are_refused() -> None:
    made = HandMade()
    left = made.node("MatMul", made.random("l", 6, 6), "x", output="left")
    double = made.node("Cast", left, output="d", to=TensorProto.DOUBLE)
    weight = made.random("w64", WIDTH, WIDTH, kind=TensorProto.DOUBLE)
    back = made.node("Cast", made.node("MatMul", double, weight, output="p"), output="b", to=TensorProto.FLOAT)
    made.initializers += [
        numpy_helper.from_array(np.ones((WIDTH, 8), np.int8), "w8"),
        numpy_helper.from_array(np.float32(0.1), "s"),
    ]
    decoded = made.node("DequantizeLinear", "w8", "s", output="w")
    reasons = [linear.refusal for linear in found_in(made.model(made.node("MatMul", back, decoded, output="y")))]
    assert reasons == [
        "its weight is the left factor",
        "it computes in DOUBLE, not one of FLOAT, FLOAT16, BFLOAT16",
        "its weight is quantized already (INT8)",
    ]


def test_an_add_that_is_no_bias_stays_outside() -> None:
    made = HandMade()
    product = made.node("MatMul", "x", made.random("fc.weight", WIDTH, WIDTH), output="p")
    (linear,) = found_in(made.model(made.node("Add", product, "x", output="y")))
    assert linear.bias is None
    assert linear.y.name == "p"


def test_a_product_that_is_read_twice_keeps_its_add_outside() -> None:
    made = HandMade()
    product = made.node("MatMul", "x", made.random("fc.weight", WIDTH, 32), output="p")
    biased = made.node("Add", product, made.random("fc.bias", 32), output="b")
    (linear,) = found_in(made.model(made.node("Mul", product, biased, output="y")))
    assert linear.bias is None


def test_names_come_from_weights_biases_scopes_and_nodes_and_are_unique() -> None:
    made = HandMade()
    shared = made.random("tied.weight", WIDTH, WIDTH)
    h = made.node("MatMul", "x", shared, output="h0")
    h = made.node("MatMul", h, shared, output="h1")
    h = made.node("MatMul", h, made.random("val_3", WIDTH, WIDTH), output="h2")
    h = made.node("Add", h, made.random("blocks.0.to_q.bias", WIDTH), output="h3")
    h = made.node("MatMul", h, made.random("val_4", WIDTH, WIDTH), output="h4", name="/blocks.0/ff/ff.2/MatMul")
    h = made.node("MatMul", h, made.random("val_5", WIDTH, WIDTH), output="h5", name="MatMul_7")
    model = made.model(made.node("MatMul", h, made.random("val_6", WIDTH, WIDTH), output="y"))
    names = [linear.name for linear in found_in(model)]
    assert names[:5] == ["tied", "tied_2", "blocks.0.to_q", "blocks.0.ff.2", "MatMul_7"]
    assert len(set(names)) == 6


def test_no_name_stands_above_a_graph_output() -> None:
    made = HandMade()
    model = made.model(made.node("MatMul", "x", made.random("fc.weight", WIDTH, WIDTH), output="fc.output"))
    assert [linear.name for linear in found_in(model)] == ["fc_2"]


def test_a_layer_in_a_subgraph_is_refused() -> None:
    made = HandMade()
    made.random("w", WIDTH, WIDTH)
    made.initializers.append(numpy_helper.from_array(np.array(True), "condition"))
    result = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
    branches = {
        "then_branch": helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["b"])], "then", [], [result]),
        "else_branch": helper.make_graph([helper.make_node("Neg", ["x"], ["b"])], "else", [], [result]),
    }
    model = made.model(made.node("If", "condition", output="y", **branches))
    assert [linear.refusal for linear in found_in(model)] == ["it is in a subgraph of a node If"]


def test_foreign_domains_have_no_linears() -> None:
    made = HandMade()
    made.random("w", WIDTH, WIDTH)
    made.nodes.append(helper.make_node("MatMul", ["x", "w"], ["y"], domain="com.example"))
    assert found_in(made.model("y", extra_domain="com.example")) == []
