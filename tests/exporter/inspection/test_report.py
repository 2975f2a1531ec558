"""What is in a file, told of real files: plain, traced, exported and lowered graphs, and engines."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import onnx
import pytest
from rich.console import Console

from exporter.errors import InputError
from exporter.files import sha256_of
from exporter.inspection.report import Inspection, inspect_path
from exporter.inspection.show import print_inspection
from exporter.onnx_files import data_path, save_onnx
from exporter.origin import Origin
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.targets import TARGETS
from tests.exporter.onnx_input.models import WIDTH, HandMade, matmul_and_add, save
from tests.exporter.passes.plugins import plugin_graphs
from tests.exporter.passes.plugins.plugin_graphs import PluginGraph
from tests.exporter.passes.waist_graphs import WaistGraph, make_weight, one_linear

BIAS = 24
WEIGHTS = BIAS * 64


def lowered(target: str = "cpu", activation: str = "e2m3") -> onnx.ModelProto:
    passes = (*WAIST_PASSES, *lowering_passes(TARGETS[target]))
    return run_passes(one_linear(make_weight("blocks.0.fc"), activation), passes, TARGETS[target])[0]


@pytest.mark.parametrize(
    ("target", "size", "encoding"), [("cpu", WEIGHTS // 2, "uint8"), ("rtx-sm89", WEIGHTS, "int8")]
)
def test_a_lowered_graph(target: str, size: int, encoding: str, tmp_path: Path) -> None:
    path = save(lowered(target), tmp_path / "m.onnx")
    found = inspect_path(path)
    (layer,) = found.layers
    assert (layer.layer, layer.weight_format, layer.activation_format) == ("blocks.0.fc", "e2m1", "e2m3")
    assert (layer.scales, layer.group_size, layer.container) == ("foldable", 16, "int8")
    assert (layer.in_features, layer.out_features) == (64, BIAS)
    assert (layer.weight_bytes, layer.encoding) == (size, encoding)
    largest = max(onnx.load(path).graph.initializer, key=lambda tensor: math.prod(tensor.dims))
    assert layer.stored_type == onnx.TensorProto.DataType.Name(largest.data_type)
    assert (found.state, found.target, found.opset) == ("lowered", target, 21)
    assert found.totals.parameters == WEIGHTS + BIAS
    assert found.totals.high_precision_parameters == 0
    assert found.totals.file_bytes == path.stat().st_size
    assert found.totals.nodes == sum(found.operators.values()) == len(onnx.load(path).graph.node)
    assert [result.name for result in found.passes][:2] == ["imported", "drop_noop_squeezes"]


@pytest.mark.parametrize("fused", [True, False])
def test_plugins(fused: bool, tmp_path: Path) -> None:
    """A residual's plugin keeps the layer's result to itself, and its other inputs are no part of the layer."""
    graph = PluginGraph()
    y = graph.linear("x", make_weight("blocks.0.fc", features=64, group_size=0, kind="channel"))
    gated = graph.node("Mul", graph.row("gate"), y, output="gated")
    model = plugin_graphs.lowered(graph.model(graph.node("Add", "x", gated, output="sum") if fused else gated))
    found = inspect_path(save(model, tmp_path / "m.onnx"))
    (layer,) = found.layers
    # 64 rows of one tile of 128 fields, four bits each.
    assert (found.state, layer.weight_bytes, layer.stored_type, layer.encoding) == ("lowered", 4096, "INT32", "int8")
    assert (found.totals.parameters, found.totals.high_precision_parameters) == (64 * 64 + 64 + 64, 64)


def test_a_weight_only_layer_has_no_encoding(tmp_path: Path) -> None:
    (layer,) = inspect_path(save(lowered(activation="none"), tmp_path / "m.onnx")).layers
    assert (layer.activation_format, layer.encoding) == ("none", "-")


def test_an_exported_and_a_traced_graph(tmp_path: Path) -> None:
    traced = one_linear(make_weight("fc"))
    exported, _ = run_passes(traced, WAIST_PASSES, TARGETS["cpu"])
    found = inspect_path(save(exported, tmp_path / "exported.onnx"))
    assert found.state == "exported"
    (layer,) = found.layers
    assert (layer.stored_type, layer.weight_bytes, layer.encoding) == ("INT32", WEIGHTS // 2, "float32")
    assert any(name.startswith("fp4export::FloatGemm_") for name in found.operators)
    assert found.totals.parameters == WEIGHTS + BIAS
    found = inspect_path(save(traced, tmp_path / "traced.onnx"))
    (layer,) = found.layers
    assert (layer.layer, layer.weight_format, layer.activation_format) == ("fc", "e2m1", "e2m3")
    assert (layer.scales, layer.container, layer.stored_type) == ("group", "-", "UINT8")
    assert found.passes == ()


def test_what_stays_in_high_precision_is_counted(tmp_path: Path) -> None:
    waist = WaistGraph()
    y = waist.linear("x", make_weight("fc", features=64))
    gain = waist.constant("gain", make_weight("other").scales[:1, :1].repeat(64, axis=1))
    exported, _ = run_passes(waist.model(waist.node("Mul", y, gain, output="y")), WAIST_PASSES, TARGETS["cpu"])
    totals = inspect_path(save(exported, tmp_path / "m.onnx")).totals
    assert (totals.parameters, totals.high_precision_parameters) == (64 * 64 + 64 + 64, 64)


def test_a_foreign_graph_shows_its_linear_layers(tmp_path: Path) -> None:
    found = inspect_path(save(matmul_and_add("blocks.0.fc", kind=onnx.TensorProto.FLOAT16), tmp_path / "m.onnx"))
    (layer,) = found.layers
    assert (found.state, found.target, found.passes) == ("foreign", "", ())
    assert (layer.layer, layer.weight_format, layer.stored_type) == ("blocks.0.fc", "float16", "FLOAT16")
    assert layer.weight_bytes == WIDTH * 32 * 2
    assert found.totals.quantized_layers == 0
    assert found.totals.parameters == found.totals.high_precision_parameters == WIDTH * 32 + 32


def test_external_data_counts(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save_onnx(matmul_and_add(), path, largest=0)
    found = inspect_path(path)
    assert found.totals.file_bytes == path.stat().st_size + data_path(path).stat().st_size
    data_path(path).unlink()
    with pytest.raises(InputError, match=r"m\.onnx\.data"):
        inspect_path(path)


def engine(folder: Path) -> Path:
    """A file with an engine's header, and the origin of one that was built from a lowered graph."""
    work = folder / "e.work"
    work.mkdir()
    graph = save(lowered("rtx-sm89"), work / "lowered.onnx")
    path = folder / "e.plan"
    path.write_bytes(b"vtrt\0\0\0\0" + (2).to_bytes(8, "little") + (32).to_bytes(8, "little") + bytes(8))
    Origin(str(work), graph.name, "", sha256_of(graph), sha256_of(path), None).save(path)
    return path


def test_an_engine_is_shown_through_the_graph_it_was_built_from(tmp_path: Path) -> None:
    found = inspect_path(engine(tmp_path))
    assert found.header == "TensorRT-RTX engine, header version 2"
    assert "cannot be looked into without its GPU: this is lowered.onnx" in found.note
    assert found.totals.file_bytes == 32
    assert [layer.layer for layer in found.layers] == ["blocks.0.fc"]


def test_an_engine_without_origin_shows_its_header_alone(tmp_path: Path) -> None:
    path = engine(tmp_path)
    path.with_name("e.plan.origin.json").unlink()
    found = inspect_path(path)
    assert (found.graph, found.state, found.layers) == (None, "unknown", ())
    assert "its layers are unknown" in found.note
    assert "TensorRT-RTX engine" in shown(found)


def test_engines_and_graphs_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    path = engine(tmp_path)
    save(lowered("rtx-sm86"), tmp_path / "e.work" / "lowered.onnx")
    with pytest.raises(InputError, match=r"lowered\.onnx, which it was built from, is gone or has changed"):
        inspect_path(path)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="is about another engine"):
        inspect_path(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="a damaged TensorRT-RTX engine: 31 of 32 bytes"):
        inspect_path(path)


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; inspect takes"):
        inspect_path(tmp_path / "absent.onnx")
    (tmp_path / "text.plan").write_text("text")
    with pytest.raises(InputError, match=r"text\.plan: not a TensorRT-RTX engine, and no text\.plan\.origin\.json"):
        inspect_path(tmp_path / "text.plan")
    (tmp_path / "text.onnx").write_text("text")
    with pytest.raises(InputError, match=r"text\.onnx: not an ONNX file"):
        inspect_path(tmp_path / "text.onnx")


def shown(found: Inspection) -> str:
    text = io.StringIO()
    print_inspection(found, Console(file=text, width=160))
    return text.getvalue()


def test_the_main_job_s_output_has_every_layer_and_pass(tiny_export: Path) -> None:
    found = inspect_path(tiny_export)
    names = [result.name for result in found.passes]
    assert found.totals.quantized_layers == 20
    assert names == ["imported", *(run.__name__ for run in (*WAIST_PASSES, *lowering_passes(TARGETS["cpu"])))]
    assert found.passes[0].nodes > found.passes[len(WAIST_PASSES)].nodes
    assert found.passes[-1].nodes == found.totals.nodes
    assert {layer.weight_format for layer in found.layers} == {"e2m1", "e3m0"}
    assert found.totals.share_of_fp32 is not None
    assert 0 < found.totals.share_of_fp32 < 1


def test_tables_and_json_say_the_same(tmp_path: Path) -> None:
    found = inspect_path(save(lowered(), tmp_path / "m.onnx"))
    text = shown(found)
    for fact in ("1 quantized layers", "blocks.0.fc", "64 x 24", "foldable", "MatMulInteger", "pack_weights", "cpu"):
        assert fact in text
    document = json.loads(found.to_json())
    assert document["layers"][0]["weight_bytes"] == WEIGHTS // 2
    assert document["totals"]["parameters"] == WEIGHTS + BIAS
    assert document["passes"][0] == {"name": "imported", "changed": 0, "nodes": found.passes[0].nodes}


def test_a_plain_graph_is_shown_without_passes(tmp_path: Path) -> None:
    made = HandMade()
    text = shown(inspect_path(save(made.model(made.node("Abs", "x", output="y")), tmp_path / "m.onnx")))
    assert "passes: none are recorded" in text
    assert "linear layers" not in text
