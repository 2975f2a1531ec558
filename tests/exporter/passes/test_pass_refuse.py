"""Nothing that the target cannot run gets past the last pass."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from exporter.errors import InputError
from exporter.passes import WAIST_PASSES, lowering_passes, refuse_unsupported, run_passes
from exporter.passes.compute_type import compute_in_fp16
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import WaistGraph, make_weight, one_linear, op_types, run, tokens


@pytest.mark.parametrize("target", ["cpu", "rtx-sm86"])
def test_layer_that_was_not_lowered_is_named(target: str) -> None:
    with pytest.raises(InputError, match=rf"blocks\.7\.fc: target {target} cannot run"):
        run_passes(one_linear(make_weight("blocks.7.fc")), (refuse_unsupported,), TARGETS[target])


@pytest.mark.parametrize("target", ["cpu", "rtx-sm86"])
def test_layer_that_could_not_be_fused_is_named(target: str) -> None:
    waist = WaistGraph()
    y = waist.linear("x", make_weight("blocks.7.fc"))
    largest = waist.node("ReduceMax", "blocks.7.fc/w", output="largest", keepdims=0)
    model, _ = run_passes(waist.model(waist.node("Add", y, largest, output="y")), WAIST_PASSES, TARGETS[target])
    with pytest.raises(InputError, match=r"blocks\.7\.fc.*weight: none"):
        run_passes(model, lowering_passes(TARGETS[target]), TARGETS[target])


def test_boundary_marker_that_was_not_removed_is_named() -> None:
    waist = WaistGraph()
    model = waist.model(waist.node("Neg", waist.boundary("x", "blocks.0.input", "m"), output="y"))
    with pytest.raises(InputError, match=r"blocks\.0\.input"):
        run_passes(model, (refuse_unsupported,), TARGETS["cpu"])


def test_operator_that_tensorrt_does_not_parse_is_named() -> None:
    waist = WaistGraph()
    model = waist.model(waist.node("Det", "x", output="y"), x_shape=("batch", 64), rank=1)
    assert op_types(run_passes(model, (refuse_unsupported,), TARGETS["cpu"])[0]) == ["Det"]
    with pytest.raises(InputError, match=r"node 'y_node': target rtx-sm89 cannot run operator Det"):
        run_passes(model, (refuse_unsupported,), TARGETS["rtx-sm89"])


def _other_domain(domain: str) -> onnx.ModelProto:
    waist = WaistGraph()
    model = waist.model(waist.node("Gelu", "x", output="y", domain=domain))
    model.opset_import.add(domain=domain, version=1)
    return model


def test_operator_of_another_domain_is_named() -> None:
    with pytest.raises(InputError, match=r"node 'y_node': target cpu cannot run operator somebody\.s::Gelu"):
        run_passes(_other_domain("somebody.s"), (refuse_unsupported,), TARGETS["cpu"])


def test_a_node_without_a_name_is_named_by_what_it_makes() -> None:
    model = _other_domain("somebody.s")
    model.graph.node[0].name = ""
    with pytest.raises(InputError, match=r"^the node that makes 'y': target cpu"):
        run_passes(model, (refuse_unsupported,), TARGETS["cpu"])


def test_onnx_runtime_s_own_operators_are_left_to_it() -> None:
    model, _ = run_passes(_other_domain("com.microsoft"), (refuse_unsupported,), TARGETS["cpu"])
    assert run(model, tokens())[0].shape == tokens().shape
    with pytest.raises(InputError, match=r"com\.microsoft::Gelu"):
        run_passes(model, (refuse_unsupported,), TARGETS["rtx-sm89"])


def test_operator_that_only_later_parsers_take_is_named_with_the_release() -> None:
    waist = WaistGraph()
    model = waist.model(waist.node("Mish", "x", output="y"))
    run_passes(model, (refuse_unsupported,), TARGETS["b200"])
    message = r"node 'y_node': target orin cannot run operator Mish: the ONNX parser of TensorRT 10\.3"
    with pytest.raises(InputError, match=message):
        run_passes(model, (refuse_unsupported,), TARGETS["orin"])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            TensorProto.DOUBLE,
            r"node 'wide_node': target h100 cannot run Cast with 'wide' of type DOUBLE.* 10\.3",
        ),
        (TensorProto.INT8, r"Cast with 'wide' of type INT8"),
        (TensorProto.FLOAT8E4M3FN, r"Cast with 'wide' of type FLOAT8E4M3FN"),
    ],
)
def test_type_that_the_parser_does_not_take_there_is_named(kind: int, message: str) -> None:
    waist = WaistGraph()
    wide = waist.node("Cast", "x", output="wide", to=kind)
    model = waist.model(waist.node("Cast", wide, output="y", to=TensorProto.FLOAT))
    run_passes(model, (refuse_unsupported,), TARGETS["cpu"])
    with pytest.raises(InputError, match=message):
        run_passes(model, (refuse_unsupported,), TARGETS["h100"])


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.INT64, TensorProto.BOOL])
def test_type_that_every_parser_takes_passes(kind: int) -> None:
    waist = WaistGraph()
    model = waist.model(
        waist.node("Cast", waist.node("Cast", "x", output="other", to=kind), output="y", to=TensorProto.FLOAT)
    )
    run_passes(model, (refuse_unsupported,), TARGETS["orin"])


def test_plain_graph_passes() -> None:
    waist = WaistGraph()
    _, (result,) = run_passes(
        waist.model(waist.node("Abs", "x", output="y")), (refuse_unsupported,), TARGETS["rtx-sm120"]
    )
    assert result.changed == 0


@pytest.mark.parametrize("operator", ["MatMul", "Gemm"])
def test_products_with_fp32_results_are_refused_where_the_builder_has_none(operator: str) -> None:
    waist = WaistGraph()
    product = waist.node(operator, "x", waist.constant("w", np.ones((64, 64), np.float32)), output="y")
    model = waist.model(product, x_shape=("batch",), rank=2)
    run_passes(model, (refuse_unsupported,), TARGETS["rtx-sm80"])
    with pytest.raises(
        InputError, match=f"'y_node': target rtx-sm75 cannot run {operator} with an FP32.*compute: fp16"
    ):
        run_passes(model, (refuse_unsupported,), TARGETS["rtx-sm75"])
    halves, _ = run_passes(model, (compute_in_fp16, refuse_unsupported), TARGETS["rtx-sm75"])
    assert "Cast" in op_types(halves)
