"""Reading: what is converted, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.errors import InputError
from exporter.onnx_files import save_onnx
from exporter.onnx_input.linears import find_linears
from exporter.onnx_input.model import GraphState, prepared, read_source, state_of
from exporter.passes import WAIST_PASSES, run_passes
from exporter.passes.driver import import_graph
from exporter.runtime import OnnxSession
from exporter.targets import TARGETS
from tests.exporter.onnx_input.models import TOKENS, WIDTH, HandMade, matmul_and_add, save
from tests.exporter.passes.plugins.plugin_graphs import lowered as lowered_to_plugins
from tests.exporter.passes.waist_graphs import make_weight, one_linear

CPU = TARGETS["cpu"]


def opset_of(model: onnx.ModelProto) -> int:
    return next(entry.version for entry in model.opset_import if not entry.domain)


def test_an_old_opset_is_raised_and_computes_the_same() -> None:
    made = HandMade()
    product = made.node("MatMul", "x", made.random("fc.weight", WIDTH, WIDTH), output="p")
    # In opset 17 the axes are an attribute; in 18 they are an input.
    model = made.model(made.node("ReduceMean", product, output="y", axes=[-1], keepdims=1), opset=17)
    ready = prepared(model, "model.onnx", CPU)
    assert (opset_of(model), opset_of(ready)) == (17, 21)
    x = np.random.default_rng(0).standard_normal((2, TOKENS, WIDTH)).astype(np.float32)
    before, after = (OnnxSession(graph).run({"x": x})["y"] for graph in (model, ready))
    assert np.array_equal(before, after)


@pytest.mark.parametrize("opset", [21, 22, 23])
def test_opsets_of_the_passes_stay(opset: int) -> None:
    assert opset_of(prepared(onnx.ModelProto.FromString(_bytes(opset)), "m", CPU)) == opset


def _bytes(opset: int) -> bytes:
    model = matmul_and_add()
    next(entry for entry in model.opset_import if not entry.domain).version = opset
    return model.SerializeToString()


@pytest.mark.parametrize("opset", [9, 16, 24, 26])
def test_opsets_out_of_range_are_refused(opset: int) -> None:
    model = onnx.ModelProto.FromString(_bytes(opset))
    with pytest.raises(InputError, match=rf"m\.onnx: uses ONNX operators of version {opset}; .* 17 to 23"):
        prepared(model, "m.onnx", CPU)


def test_an_invalid_model_is_refused_with_what_is_wrong() -> None:
    made = HandMade()
    model = made.model(made.node("MatMul", "x", made.random("fc.weight", WIDTH, 8), output="y"))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((WIDTH + 1, 8), np.float32), "fc.weight"))
    with pytest.raises(InputError, match=r"m\.onnx: not a valid ONNX model: .*MatMul"):
        prepared(model, "m.onnx", CPU)


@pytest.mark.parametrize("op_type", ["Upsample", "NoSuchOperator"])
def test_an_operator_that_cannot_be_converted_is_named(op_type: str) -> None:
    with pytest.raises(InputError, match=rf"m\.onnx: cannot be converted to ONNX operators of version 21: .*{op_type}"):
        prepared(_unconvertible(op_type), "m.onnx", CPU)


def _unconvertible(op_type: str) -> onnx.ModelProto:
    node = helper.make_node(op_type, ["x"], ["y"], name="n1")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, WIDTH]) for name in "xy"]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_sparse_initializers_are_refused() -> None:
    model = matmul_and_add()
    values, indices = np.ones(1, np.float32), np.zeros(1, np.int64)
    tensors = (numpy_helper.from_array(values, "s"), numpy_helper.from_array(indices, "i"))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(*tensors, [3]))
    with pytest.raises(InputError, match="sparse initializers"):
        prepared(model, "m.onnx", CPU)


def test_initializers_that_are_inputs_are_constants_afterwards() -> None:
    model = matmul_and_add()
    tensor = model.graph.initializer[0]
    model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    assert [value.name for value in prepared(model, "m", CPU).graph.input] == ["x"]


def test_function_bodies_of_others_are_inlined() -> None:
    body = helper.make_function(
        "pkg.linear",
        "Linear",
        ["x", "w"],
        ["y"],
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [helper.make_opsetid("", 21)],
    )
    made = HandMade()
    made.random("fc.weight", WIDTH, 8)
    made.nodes.append(helper.make_node("Linear", ["x", "fc.weight"], ["y"], domain="pkg.linear"))
    graph = helper.make_graph(
        made.nodes,
        "functions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 8])],
        made.initializers,
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("pkg.linear", 1)]
    model = helper.make_model(graph, functions=[body], opset_imports=imports, ir_version=10)
    ready = prepared(model, "m", CPU)
    assert [linear.name for linear in find_linears(import_graph(ready))] == ["fc"]


def test_torch_s_scopes_name_layers_whose_weights_lost_their_names() -> None:
    made = HandMade()
    y = made.node("MatMul", "x", made.random("val_12", WIDTH, 8), output="y", name="node_linear")
    model = made.model(y)
    scopes = "['', 'blocks.0', 'blocks.0.to_v', 'linear']"
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    graph = import_graph(prepared(model, "m", CPU))
    assert [linear.name for linear in find_linears(graph)] == ["blocks.0.to_v"]


@pytest.mark.parametrize("scopes", ["[", "['only']", "3", "[1, 2]"])
def test_damaged_scopes_are_passed_over(scopes: str) -> None:
    model = matmul_and_add()
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    assert [linear.name for linear in find_linears(import_graph(prepared(model, "m", CPU)))] == ["fc"]


def test_states() -> None:
    waist = one_linear(make_weight("fc"))
    lowered = run_passes(matmul_and_add(), (), CPU)[0]
    assert state_of(matmul_and_add()) is GraphState.FOREIGN
    assert state_of(run_passes(waist, WAIST_PASSES, CPU)[0]) is GraphState.WAIST
    assert state_of(lowered) is GraphState.LOWERED
    assert state_of(lowered_to_plugins(waist)) is GraphState.LOWERED


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.onnx: cannot be read: No such file"):
        read_source(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("not a protobuf at all")
    with pytest.raises(InputError, match=r"text\.onnx: not an ONNX file"):
        read_source(tmp_path / "text.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(InputError, match=r"empty\.onnx: not an ONNX file"):
        read_source(tmp_path / "empty.onnx")


def test_missing_weights_are_named(tmp_path: Path) -> None:
    save_onnx(matmul_and_add(), tmp_path / "big.onnx", largest=0)
    (tmp_path / "big.onnx.data").unlink()
    with pytest.raises(InputError, match=r"big\.onnx.*big\.onnx\.data"):
        read_source(tmp_path / "big.onnx")


def test_a_saved_model_is_read_as_it_was(tmp_path: Path) -> None:
    model = matmul_and_add()
    assert read_source(save(model, tmp_path / "m.onnx")) == model
