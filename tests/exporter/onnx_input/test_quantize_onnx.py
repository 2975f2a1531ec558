"""The whole way from an ONNX model to an engine, on real models, with the real runtime."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from exporter.errors import EnvironmentLacksError, InputError
from exporter.gate.reference import EXACT_DB
from exporter.onnx_files import data_path, save_onnx
from exporter.onnx_input.job import OnnxResult, quantize_onnx
from exporter.onnx_input.selection import FormatOptions
from exporter.passes.history import read_pass_history
from exporter.passes.layer_table import read_layer_table
from exporter.runtime import OnnxSession
from tests.exporter.onnx_input.models import TOKENS, WIDTH, HandMade, export_dit, export_pixart, save
from tests.exporter.passes.waist_graphs import make_weight, one_linear

W4A6 = FormatOptions("e2m1", group=32)
LOSSLESS = FormatOptions("e2m1", activation="none", scales="channel")
HALF = TensorProto.FLOAT16


def quantized(model: onnx.ModelProto, folder: Path, options: FormatOptions = LOSSLESS) -> OnnxResult:
    return quantize_onnx(save(model, folder / "model.onnx"), folder / "out.onnx", options)


def _matmul(made: HandMade) -> str:
    y = made.node("MatMul", "x", made.on_grid("fc.weight", WIDTH, 32), output="p")
    return made.node("Add", y, made.random("fc.bias", 32), output="y")


def _bias_first(made: HandMade) -> str:
    y = made.node("MatMul", "x", made.on_grid("fc.weight", WIDTH, 32), output="p")
    return made.node("Add", made.random("fc.bias", 1, 1, 32), y, output="y")


def _transposed(made: HandMade) -> str:
    turned = made.node("Transpose", made.on_grid("fc.weight", 32, WIDTH), output="t", perm=[1, 0])
    return made.node("MatMul", "x", turned, output="y")


def _stored_narrow(made: HandMade) -> str:
    stored = made.on_grid("fc.weight", WIDTH, 32, kind=TensorProto.BFLOAT16)
    return made.node("MatMul", "x", made.node("Cast", stored, output="w", to=TensorProto.FLOAT), output="y")


def _shared(made: HandMade) -> str:
    weight = made.on_grid("tied.weight", WIDTH, WIDTH)
    return made.node("MatMul", made.node("MatMul", "x", weight, output="h"), weight, output="y")


def _gemm(made: HandMade) -> str:
    inputs = ["x", made.on_grid("fc.weight", WIDTH, 32), made.random("fc.bias", 32)]
    return made.node("Gemm", *inputs, output="y", alpha=0.5, beta=3.0)


def _gemm_trans_b(made: HandMade) -> str:
    return made.node("Gemm", "x", made.on_grid("fc.weight", 32, WIDTH), output="y", transB=1)


def _gemm_trans_a(made: HandMade) -> str:
    turned = made.node("Transpose", "x", output="t", perm=[1, 0])
    return made.node("Gemm", turned, made.on_grid("fc.weight", WIDTH, 32), output="y", transA=1)


def _gemm_with_addend(made: HandMade) -> str:
    addend = made.node("Abs", "x", output="a")
    return made.node("Gemm", "x", made.on_grid("fc.weight", WIDTH, WIDTH), addend, output="y", beta=2.0)


@pytest.mark.parametrize(
    ("build", "rank", "kind"),
    [
        (_matmul, 3, TensorProto.FLOAT),
        (_bias_first, 3, TensorProto.FLOAT),
        (_transposed, 3, TensorProto.FLOAT),
        (_stored_narrow, 3, TensorProto.FLOAT),
        (_shared, 3, TensorProto.FLOAT),
        (_gemm, 2, TensorProto.FLOAT),
        (_gemm_trans_b, 2, TensorProto.FLOAT),
        (_gemm_trans_a, 2, TensorProto.FLOAT),
        (_gemm_with_addend, 2, TensorProto.FLOAT),
        (_matmul, 3, HALF),
        (_transposed, 3, HALF),
        (_gemm, 2, HALF),
        (_gemm_trans_a, 2, HALF),
        (_gemm_with_addend, 2, HALF),
    ],
)
def test_a_lossless_quantization_computes_what_the_model_computes(
    build: Callable[[HandMade], str], rank: int, kind: int, tmp_path: Path
) -> None:
    made = HandMade(rank=rank, kind=kind)
    result = quantized(made.model(build(made)), tmp_path)
    assert result.snr_db is not None
    assert result.snr_db > (100 if kind == TensorProto.FLOAT else 60)
    assert result.fidelity is not None
    assert result.fidelity.passed
    session = OnnxSession(result.output)
    assert session.outputs[0].dtype == (np.float32 if kind == TensorProto.FLOAT else np.float16)


def test_a_bfloat16_model_is_quantized_without_comparison(tmp_path: Path) -> None:
    made = HandMade(kind=TensorProto.BFLOAT16)
    source = save(made.model(_matmul(made)), tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"model\.onnx: on random inputs: ONNX Runtime cannot run it.*--no-validate"):
        quantize_onnx(source, tmp_path / "out.onnx", LOSSLESS)
    result = quantize_onnx(source, tmp_path / "out.onnx", LOSSLESS, validate=False)
    assert (result.snr_db, result.fidelity) == (None, None)
    nodes = onnx.load(result.output).graph.node
    assert (nodes[-1].op_type, nodes[-1].attribute[0].i) == ("Cast", TensorProto.BFLOAT16)


def test_layers_with_one_weight_share_their_codes(tmp_path: Path) -> None:
    made = HandMade()
    result = quantized(made.model(_shared(made)), tmp_path)
    exported = onnx.load(result.work_dir / "exported.cpu.onnx")
    assert [layer.name for layer in result.selection.layers] == ["tied", "tied_2"]
    assert sum(tensor.name.endswith(".words") for tensor in exported.graph.initializer) == 1


def test_a_weight_that_is_read_both_ways_is_two_weights(tmp_path: Path) -> None:
    made = HandMade(rank=2)
    weight = made.on_grid("tied.weight", WIDTH, WIDTH)
    hidden = made.node("Gemm", "x", weight, output="h", transB=1)
    result = quantized(made.model(made.node("Gemm", hidden, weight, output="y")), tmp_path)
    assert result.snr_db is not None
    assert result.snr_db > 100


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_dit(tmp_path_factory.mktemp("dit") / "dit.onnx")


@pytest.fixture(scope="module")
def result(dit: Path) -> OnnxResult:
    return quantize_onnx(dit, dit.parent / "out.onnx", W4A6)


def test_a_dit_is_quantized_but_for_its_embedders_and_final_layer(result: OnnxResult) -> None:
    names = [layer.name for layer in result.selection.layers]
    parts = ("to_q", "to_k", "to_v", "ff.0", "ff.2")
    assert names == [f"blocks.{block}.{part}" for block in (0, 1) for part in parts]
    assert [kept.name for kept in result.selection.kept] == [
        "x_embedder",
        "t_embedder.0",
        "t_embedder.2",
        "final_layer",
    ]
    assert result.snr_db is not None
    assert result.snr_db > 15
    assert result.output_bytes < 0.5 * result.source_bytes


def test_the_gate_compares_every_layer_in_both_graphs(result: OnnxResult) -> None:
    fidelity = result.fidelity
    assert fidelity is not None
    linears = Counter(row.stage for row in fidelity.rows if row.kind == "linear")
    assert linears == {"exported": 10, "lowered": 10}
    first = fidelity.rows[0]
    assert (first.kind, first.name, first.threshold_db) == ("end_to_end", "not quantized", EXACT_DB)
    assert fidelity.code_mismatch_fraction == 0
    assert fidelity.worst_snr_db("linear") > 100
    assert json.loads((result.work_dir / "gate.cpu" / "result.json").read_text())["passed"] is True


def test_attention_products_are_untouched_and_layers_that_share_an_input_share_its_quantizer(
    result: OnnxResult,
) -> None:
    lowered = onnx.load(result.output)
    operators = Counter(node.op_type for node in lowered.graph.node)
    # Two products of activations in each of two blocks, and two linears that kept their MatMul.
    assert (operators["MatMul"], operators["MatMulInteger"]) == (6, 10)
    table = {entry.layer: entry for entry in read_layer_table(lowered)}
    assert table["blocks.0.to_q"].values == table["blocks.0.to_v"].values
    assert {entry.container for entry in table.values()} == {"int8"}


def test_the_history_starts_with_the_foreign_graph(result: OnnxResult) -> None:
    names = [entry.name for entry in read_pass_history(onnx.load(result.output))]
    assert names[:2] == ["imported", "insert_quantizers"]
    assert names[-1] == "refuse_unsupported"


def test_the_batch_stays_dynamic(result: OnnxResult) -> None:
    session = OnnxSession(result.output)
    x = np.zeros((5, TOKENS, 8), np.float32)
    (y,) = session.run({"x": x, "timestep": np.arange(5)}).values()
    assert y.shape == x.shape


@pytest.mark.parametrize(("opset", "dtype"), [(23, torch.float32), (20, torch.float16)])
def test_other_opsets_and_half_precision(opset: int, dtype: torch.dtype, tmp_path: Path) -> None:
    source = export_dit(tmp_path / "dit.onnx", opset=opset, dtype=dtype)
    result = quantize_onnx(source, tmp_path / "out.onnx", W4A6)
    assert len(result.selection.layers) == 10
    assert result.fidelity is not None
    assert result.fidelity.passed
    assert result.snr_db is not None
    assert result.snr_db > 15


def test_weights_alone_of_a_half_precision_model(tmp_path: Path) -> None:
    source = export_dit(tmp_path / "dit.onnx", dtype=torch.float16)
    result = quantize_onnx(source, tmp_path / "out.onnx", FormatOptions("e1m2", activation="none", group=16))
    assert result.fidelity is not None
    end = result.fidelity.rows[-1]
    # One step of the inputs in FP16 is about 66 dB; FP32 linears between FP16 tensors agree far better.
    assert end.threshold_db < 80
    assert end.snr_db > 90


def test_pixart_as_someone_else_exports_it(tmp_path: Path) -> None:
    source = export_pixart(tmp_path / "pixart.onnx")
    squeezes = [node for node in onnx.load(source).graph.node if node.op_type == "Squeeze"]
    result = quantize_onnx(source, tmp_path / "out.onnx", W4A6)
    block = "transformer.transformer_blocks.0"
    assert squeezes
    assert {layer.name for layer in result.selection.layers} == {
        *(f"{block}.attn{index}.{part}" for index in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
        f"{block}.ff.net.0.proj",
        f"{block}.ff.net.2",
    }
    assert {kept.name.split(".")[1] for kept in result.selection.kept} == {
        "adaln_single",
        "caption_projection",
        "proj_out",
    }
    assert result.snr_db is not None
    assert result.snr_db > 25


def test_an_exported_graph_is_lowered_for_another_target(result: OnnxResult, tmp_path: Path) -> None:
    exported = result.work_dir / "exported.cpu.onnx"
    again = quantize_onnx(exported, tmp_path / "again.onnx")
    assert onnx.load(again.output).graph == onnx.load(result.output).graph
    assert again.snr_db is not None
    assert again.snr_db > 100
    with pytest.raises(InputError, match="quantized by fp4export already; leave --format out"):
        quantize_onnx(exported, tmp_path / "again.onnx", W4A6)


def test_a_graph_as_it_was_traced_is_fused_and_lowered(tmp_path: Path) -> None:
    result = quantize_onnx(save(one_linear(make_weight("fc")), tmp_path / "traced.onnx"), tmp_path / "out.onnx")
    assert [layer.name for layer in result.selection.layers] == ["fc"]
    assert result.fidelity is not None
    assert result.fidelity.passed


def test_a_scalar_timestep(tmp_path: Path) -> None:
    made = HandMade()
    y = made.node("MatMul", "x", made.random("fc.weight", WIDTH, 32), output="p")
    model = made.model(made.node("Add", y, made.node("Cast", "t", output="f", to=TensorProto.FLOAT), output="y"))
    model.graph.input.append(onnx.helper.make_tensor_value_info("t", TensorProto.INT64, []))
    assert quantized(model, tmp_path, W4A6).fidelity is not None


def test_an_engine_is_built_without_a_gpu(dit: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    result = quantize_onnx(dit, tmp_path / "out.plan", W4A6, target="rtx-sm86")
    assert result.output.read_bytes()[:4] == b"vtrt"
    assert result.fidelity is not None
    assert result.fidelity.passed


def test_a_target_that_builds_elsewhere_leaves_its_lowered_graph(dit: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentLacksError, match=r"lowered\.h100\.onnx"):
        quantize_onnx(dit, tmp_path / "out.plan", W4A6, target="h100")
    assert (tmp_path / "out.work" / "lowered.h100.onnx").is_file()
    assert not (tmp_path / "out.plan").exists()


def test_external_data_in_and_out(tmp_path: Path) -> None:
    made = HandMade()
    model = made.model(_matmul(made))
    save_onnx(model, tmp_path / "big.onnx", largest=0)
    assert data_path(tmp_path / "big.onnx").stat().st_size > 8000
    result = quantize_onnx(tmp_path / "big.onnx", tmp_path / "out.onnx", LOSSLESS)
    assert result.source_bytes > 8000
    assert result.snr_db is not None
    assert result.snr_db > 100


def test_a_lowered_file_and_the_model_itself_are_refused(result: OnnxResult, dit: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lowered for target cpu already"):
        quantize_onnx(result.output, tmp_path / "out.onnx", W4A6)
    with pytest.raises(InputError, match="is the model itself"):
        quantize_onnx(dit, dit, W4A6)
    with pytest.raises(InputError, match="is not quantized; say which weight format"):
        quantize_onnx(dit, tmp_path / "out.onnx")
