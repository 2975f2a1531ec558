"""The inspector's check, on JSON of the form that TensorRT writes: it needs a GPU, so here the text is made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from exporter.device.engine_layers import LayerVerdict, check_layers
from exporter.device.graph import LoweredGraph, read_lowered
from exporter.errors import InputError
from tests.exporter.device.lowered_graphs import write_lowered
from tests.exporter.passes.plugins.plugin_graphs import PluginGraph, lowered
from tests.exporter.passes.waist_graphs import make_weight


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> LoweredGraph:
    return read_lowered(write_lowered(tmp_path_factory.mktemp("int8"), "orin"))


def _layer(nodes: list[str], *inputs: str, **facts: Any) -> dict[str, Any]:
    metadata = "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes)
    return {"Metadata": metadata, "Inputs": [{"Format/Datatype": text} for text in inputs], **facts}


def _check(graph: LoweredGraph, *layers: Any) -> LayerVerdict:
    (verdict,) = check_layers(graph, json.dumps({"Layers": list(layers)}))
    assert verdict.layer == "fc"
    assert verdict.expected == "int8"
    return verdict


def test_a_product_of_eight_bits_is_as_planned(graph: LoweredGraph) -> None:
    product = _layer(["fc.matmul_1", "fc.mul_2"], "Int8", "Int8", "Float", LayerType="gemm")
    assert _check(graph, _layer(["fc.quantize.int8.abs_0"], "Float"), product).state == "as planned"


@pytest.mark.parametrize("text", ["Row major Int8 format", "INT8", "Thirty-two wide channel vectorized row major Int8"])
def test_the_names_that_releases_have_for_int8(graph: LoweredGraph, text: str) -> None:
    assert _check(graph, _layer(["fc.matmul_1"], text)).state == "as planned"


def test_weights_within_the_layer_count_as_read(graph: LoweredGraph) -> None:
    assert (
        _check(graph, _layer(["fc.matmul_1"], "Float", Weights={"Type": "Int8", "Count": 2048})).state == "as planned"
    )


def test_a_product_that_silently_became_float_is_wrong(graph: LoweredGraph) -> None:
    verdict = _check(graph, _layer(["fc.values"], "Int8"), _layer(["fc.matmul_1"], "Half", "Float"))
    assert verdict.state == "wrong"
    assert verdict.found == "Float, Half"


@pytest.mark.parametrize("text", ["UInt64", "Int32", "Int64", "", "FP8"])
def test_other_types_are_no_int8(graph: LoweredGraph, text: str) -> None:
    assert _check(graph, _layer(["fc.matmul_1"], text)).state == "wrong"


def test_a_layer_of_another_name_is_not_taken_for_it(graph: LoweredGraph) -> None:
    assert _check(graph, _layer(["fc.matmul_10"], "Int8")).state == "not visible"
    assert _check(graph, "a name alone, as without detailed profiling").state == "not visible"
    assert _check(graph).state == "not visible"


def test_fp8_is_looked_for_where_it_is_planned(tmp_path: Path) -> None:
    graph = read_lowered(write_lowered(tmp_path, "h100", "e4m3"))
    for text, state in (("FP8", "as planned"), ("Float8E4M3", "as planned"), ("Int8", "wrong"), ("Half", "wrong")):
        (verdict,) = check_layers(graph, json.dumps({"Layers": [_layer(["fc.matmul_1"], text)]}))
        assert (verdict.expected, verdict.state) == ("fp8", state)


def test_a_plugin_that_goes_on_with_the_layer_s_result_is_the_layer(tmp_path: Path) -> None:
    waist = PluginGraph()
    y = waist.linear("x", make_weight("fc", features=64))
    model = waist.model(waist.node("Add", "x", y, output="sum"))
    onnx.save(lowered(model), tmp_path / "lowered.orin.onnx")
    graph = read_lowered(tmp_path / "lowered.orin.onnx")
    for kind, state in (("PluginV3", "as planned"), ("gemm", "wrong")):
        (verdict,) = check_layers(graph, json.dumps({"Layers": [_layer(["fc"], "Int8", LayerType=kind)]}))
        assert verdict.state == state
        assert verdict.expected.startswith("plugin PackedLinear_e2m1_int8_fp32_n64_k64_g16m_bias_residual")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_what_is_no_inspector_s_answer_is_refused(graph: LoweredGraph, text: str) -> None:
    with pytest.raises(InputError, match="inspector gave no list of layers"):
        check_layers(graph, text)
